"""The demo."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types

import pytest

import fa4_prefixlm as fp

ROOT = pathlib.Path(__file__).parents[2]


def load(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_demo(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = load(ROOT / "examples" / "photo.py")
    assert demo.main(["--out", str(tmp_path / "demo.png"), "--no-compile"]) == 0
    printed = capsys.readouterr().out
    for wanted in ("backend", "fp.attention", "two passes that overlap", "plain causal", "skipped", "demo.png"):
        assert wanted in printed
    assert (tmp_path / "demo.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_demo_notices_a_wrong_answer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load(ROOT / "examples" / "photo.py")
    right = fp.attention
    monkeypatch.setattr(demo.fp, "attention", lambda *arguments: right(*arguments) * 1.05)
    assert demo.main(["--out", str(tmp_path / "demo.png"), "--no-compile"]) == 1


def test_the_demo_looks_for_its_folder_first(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    demo = load(ROOT / "examples" / "photo.py")
    monkeypatch.setattr(demo.fp, "plan", lambda *_, **__: pytest.fail("it worked before it looked"))
    assert demo.main(["--out", "/no/such/folder/x.png"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--out: expected a file in an existing folder, got /no/such/folder/x.png" in said.err


def test_the_demo_says_that_it_compiles(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    demo = load(ROOT / "examples" / "photo.py")
    told: list[str] = []

    def compile_in_subprocess(*_) -> list[dict]:
        told.append(capsys.readouterr().out)
        return [{"error": None, "seconds": 1.0, "kernel": "k"}]

    monkeypatch.setattr(demo.locate, "installed", lambda: "an FA4")
    monkeypatch.setattr(demo, "compile_in_subprocess", compile_in_subprocess)
    assert demo.cross_compile()
    assert told == ["sm_90 kernel: compiling it, which takes some seconds ...\n"], "before, not after"
