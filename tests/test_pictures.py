"""Pictures and the demo."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types

import pytest

import fa4_prefixlm as fp
from fa4_prefixlm.geometry.drawn_tiles import drawn_tiles
from fa4_prefixlm.masks.dense import dense_mask
from fa4_prefixlm.masks.picture import COLOURS, HIDDEN, LETTERS, MARGIN, SPAN, VISIBLE, mask_image, mask_text

ROOT = pathlib.Path(__file__).parent.parent


def load(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_text() -> None:
    lines = mask_text(fp.PrefixLM(3), seqlen_k=6, ranges=[(1, 5)], seqlen_q=3).splitlines()
    assert lines[:3] == [".###o.", "..###.", "...###"]
    assert lines[3] == "# visible, o visible because of a span, . hidden"


def test_the_image_shows_the_mask() -> None:
    mask, spans = fp.PrefixLM(20, clamp=False), ((5, 40), (50, 60))
    image = mask_image(mask, seqlen_k=64, ranges=spans, cell=3)
    visible = dense_mask(mask, 64, 64, {"image": spans})
    shown = {bytes.fromhex(COLOURS[state][1:]): state for state in (HIDDEN, VISIBLE, SPAN)}
    for row, key in ((0, 0), (0, 1), (10, 39), (39, 5), (39, 4), (30, 11), (63, 40), (63, 44), (55, 59)):
        colour = bytes(image.getpixel((MARGIN + key * 3 + 1, MARGIN + row * 3 + 1)))
        assert (shown[colour] != HIDDEN) == bool(visible[row, key])


def test_tiles_in_the_image_are_right() -> None:
    """Pink would be a full tile with a hidden pair, or a skipped one with a visible pair."""
    mask, given = fp.PrefixLM(100), [(30, 200), (333, 480)]
    tiles = drawn_tiles(mask, seqlen_k=500, ranges=given, tile=(64, 32))
    assert {kind for _, kind in tiles} == {"full", "partial", "skipped"}
    image = mask_image(mask, seqlen_k=500, ranges=given, tiles=tiles)
    pink = bytes.fromhex(COLOURS[3][1:])
    assert pink not in {bytes(colour) for _, colour in image.getcolors(2**20)}


def test_the_demo(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = load(ROOT / "examples" / "photo.py")
    assert demo.main(["--out", str(tmp_path / "demo.png"), "--no-compile"]) == 0
    printed = capsys.readouterr().out
    for wanted in ("backend", "fp.attention", "two passes that overlap", "plain causal", "skipped", "demo.png"):
        assert wanted in printed
    assert (tmp_path / "demo.png").stat().st_size > 10_000


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


def test_letters_are_distinct() -> None:
    assert len(set(LETTERS)) == 4
