"""`Mask.show`: text that fits a terminal, an image in a file, and a notebook without Pillow."""

from __future__ import annotations

import builtins
import pathlib

import pytest
import torch

from fa4_prefixlm import PrefixLM
from fa4_prefixlm.masks import picture


def test_long_sequences_are_shown_smaller() -> None:
    mask, ranges = PrefixLM(500), [(300, 900), (1500, 1600)]
    text = str(mask.show(seqlen=3000, ranges=ranges)).splitlines()
    *rows, legend = text
    step = -(-3000 // picture.TEXT_WIDTH)
    assert len(rows) == -(-3000 // step) <= picture.TEXT_WIDTH
    assert {len(row) for row in rows} == {len(rows)}
    assert f"a character is {step} x {step} pairs" in legend
    visible = mask.dense(seqlen=3000, ranges=ranges)
    for down, across in ((0, 0), (10, 2), (60, 50), (120, 5), (25, 30), (124, 124)):
        pairs = visible[down * step : (down + 1) * step, across * step : (across + 1) * step]
        letter = rows[down][across]
        assert (letter == ".") == (not pairs.any()), (down, across)
        assert letter != "#" or pairs.all(), (down, across)


def test_short_sequences_are_shown_pair_by_pair() -> None:
    assert str(PrefixLM(3).show(seqlen=6, ranges=[(1, 5)], seqlen_q=3)).splitlines()[:3] == [
        ".###o.",
        "..###.",
        "...###",
    ]
    rows = str(PrefixLM().show(seqlen=picture.TEXT_WIDTH)).splitlines()
    assert len(rows) == picture.TEXT_WIDTH + 1
    assert "+" not in rows[-1]


def test_shrinking_keeps_what_is_alike() -> None:
    states = torch.tensor([[0, 0, 1], [0, 0, 1], [2, 2, 0]], dtype=torch.uint8)
    assert picture._shrunk(states, 2).tolist() == [[0, 1], [2, 0]]
    states[0, 0] = 1
    assert picture._shrunk(states, 2).tolist() == [[picture.MIXED, 1], [2, 0]]


def test_save(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("PIL")
    shown = PrefixLM(9).show(seqlen=40, ranges=[(3, 20)])
    shown.save(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").read_bytes() == shown._repr_png_()


def test_a_notebook_without_pillow_shows_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_pillow(name: str, *arguments: object, **named: object) -> object:
        if name.split(".")[0] == "PIL":
            raise ImportError("no PIL here")
        return real(name, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    shown = PrefixLM().show(seqlen=5)
    assert shown._repr_png_() is None
    assert "#" in repr(shown)
    with pytest.raises(ImportError, match="Pillow"):
        shown.image()
