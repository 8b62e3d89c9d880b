"""`fa4-prefixlm warmup` fills the cache for a model's layers, and says what it did."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("flash_attn", reason="flash-attn-4 is not installed")
import torch

from fa4_prefixlm import InputError
from fa4_prefixlm.tools import cli, warmup

pytestmark = pytest.mark.slow

SHAPE = ["--head-dim", "64", "--heads", "4", "--kv-heads", "2"]


def run(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FA4_PREFIXLM_CACHE": "1", "FA4_PREFIXLM_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "fa4_prefixlm", "warmup", *SHAPE, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_second_time_finds_all_of_it(tmp_path: pathlib.Path) -> None:
    first = run(tmp_path, "--arch", "sm_90", "--window", "100", "--page-size", "16")
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert [line.split()[:4] for line in lines[:2]] == [
        ["window", "100,", "with", "spans"],
        ["window", "100,", "without", "spans"],
    ]
    assert "native    compiled" in lines[0]
    assert "causal    compiled" in lines[1]
    assert lines[2].startswith("2 kernels compiled, 0 found")
    again = run(tmp_path, "--arch", "sm_90", "--window", "100", "--page-size", "16", "--json")
    said = json.loads(again.stdout.splitlines()[-1])
    assert said["kernels"] == {"loaded": 2}
    assert [own["how"] for own in said["calls"]] == ["found on disk", "found on disk"]


def test_a_kernel_that_does_not_compile_is_a_failure(tmp_path: pathlib.Path) -> None:
    done = run(tmp_path, "--arch", "sm_90", "--head-dim-v", "12")
    assert done.returncode == 1, done.stderr
    assert "failed: " in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--head-dim", "0", "a positive number"),
        ("--head-dim-v", "-8", "a positive number"),
        ("--heads", "3", "a multiple of --kv-heads = 2"),
        ("--kv-heads", "0", "a positive number"),
        ("--page-size", "0", "a positive number"),
        ("--window", "-5", "a number of tokens"),
        ("--softcap", "-1", "a number of at least 0"),
        ("--softcap", "nan", "a number of at least 0"),
        ("--sms", "0", "a positive number"),
        ("--sms", "132", "--arch beside it"),
    ],
)
def test_a_bad_option_is_named(capsys, option: str, value: str, expected: str) -> None:
    assert cli.main(["warmup", *SHAPE, option, value]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith(f"fa4-prefixlm warmup: {option}: expected {expected}"), said.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_asks_for_one(tmp_path: pathlib.Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA4_PREFIXLM_CACHE", "1")
    monkeypatch.setenv("FA4_PREFIXLM_CACHE_DIR", str(tmp_path))
    assert cli.main(["warmup", *SHAPE]) == 2
    assert "--arch sm_90" in capsys.readouterr().out


def test_without_a_cache_there_is_nothing_to_do(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA4_PREFIXLM_CACHE", "0")
    assert cli.main(["warmup", *SHAPE]) == 2
    assert "switched off" in capsys.readouterr().out


def test_windows_are_layers() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    warmup.add_arguments(parser)
    shape = warmup._shape(parser.parse_args([*SHAPE, "--window", "0", "--window", "1024", "--window", "0"]))
    assert shape.windows == (None, 1024)
    assert warmup._shape(parser.parse_args(SHAPE)).windows == (None,)
    with pytest.raises(InputError, match="--heads: expected a positive number"):
        warmup._shape(parser.parse_args([*SHAPE, "--heads", "0"]))


@pytest.mark.parametrize(
    ("made", "found", "how"),
    [
        (0, 0, "ready"),
        (0, 2, "found on disk"),
        (2, 0, "compiled"),
        (2, 1, "2 compiled, 1 found on disk"),
    ],
)
@pytest.mark.parametrize("before", [{}, {"compiled": 3, "loaded": 5}], ids=["first", "later"])
def test_what_a_call_did_is_what_was_added(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, int], made: int, found: int, how: str
) -> None:
    counts = Counter(before) + Counter(compiled=made, loaded=found)
    monkeypatch.setattr(warmup.disk_cache, "counts", counts)
    assert warmup._how(before) == how
