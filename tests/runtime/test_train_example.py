"""The training example, tiny and on the CPU: its loss falls, and SDPA with a dense mask has the same losses."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys

import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is not installed")

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "train_prefix_lm.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_prefix_lm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def quiet(step: int, steps: int, loss: float) -> None:
    pass


def test_the_loss_falls_and_sdpa_agrees(example) -> None:
    size = dataclasses.replace(example.TINY, tokens=160, rows=2)
    device = torch.device("cpu")
    ours = example.train(size, "fa4_prefixlm", device, 8, quiet)
    dense = example.train(size, "SDPA, dense mask", device, 8, quiet)
    assert ours.losses[-1] < 0.85 * ours.losses[0]
    for mine, other in zip(ours.losses, dense.losses, strict=True):
        assert mine == pytest.approx(other, rel=1e-3)
    assert ours.tokens_per_s > 0


def test_rows_are_packed_documents(example) -> None:
    row = next(example.rows_of(example.TINY, seed=3))
    assert len(row.text) == example.TINY.tokens == sum(row.lengths)
    assert int(row.is_photo.sum()) == len(row.patches)
    for start, end in row.shifted_spans():
        assert row.is_photo[start:end].all()
        assert row.position[start] == 0
    assert (row.text[row.is_photo] == 0).all()


def test_it_prints_what_it_measured(example, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--steps", "2", "--size", "tiny", "--only", "fa4_prefixlm"]) == 0
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "in 2 steps" in printed
