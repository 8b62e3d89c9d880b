"""What says how exact gradients are."""

from __future__ import annotations

import math

import pytest
import torch

from fa4_prefixlm.testing.accuracy import Gradients, worst_row
from fa4_prefixlm.testing.gradients import Errors, errors_of

BAND = Errors({"q": 2e-3, "sink": 1e-3}, {"q": 5e-3})


@pytest.mark.parametrize(
    ("whole", "row", "outside"),
    [
        ({"q": 2.4e-3, "sink": 1e-3}, {"q": 9e-3}, []),
        ({"q": 2.6e-3, "sink": 1e-3}, {"q": 9e-3}, ["dq"]),
        ({"q": 2e-3, "sink": math.nan}, {"q": 9e-3}, ["dsink"]),
        ({"q": 2e-3, "sink": 1e-3}, {"q": 1.1e-2}, ["a row of dq"]),
        ({"q": 2e-3, "sink": 1e-3}, {"q": math.nan}, ["a row of dq"]),
    ],
)
def test_what_is_outside_of_a_band(whole: dict[str, float], row: dict[str, float], outside: list[str]) -> None:
    found = Errors(whole, row).within(BAND, 1.25, 2.0)
    assert len(found) == len(outside)
    assert all(said.startswith(name) for said, name in zip(found, outside, strict=True))


def test_a_short_row_is_measured_by_all_rows() -> None:
    """By itself a row of length 1e-6 that is 1e-6 off would be as wrong as can be; a long row counts by its own."""
    exact = torch.tensor([[[3.0, 4.0]], [[1e-6, 0.0]]])
    short, long = exact.clone(), exact.clone()
    short[1, 0, 1] += 1e-6
    long[0, 0, 0] += 0.5
    rms = (25 / 2) ** 0.5
    assert worst_row(short, exact) == pytest.approx(1e-6 / rms, rel=1e-3)
    assert worst_row(long, exact) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_gradient_of_nothing_but_rounding_is_measured_against_1(sign: float) -> None:
    """A token that sees one key has none in q and k. One that is small, and there, is measured by itself."""
    nothing, small = (torch.full((3, 2, 4), sign * size, dtype=torch.float64) for size in (1e-12, 1e-8))
    errors = errors_of(Gradients(nothing + 1e-3, small * 1.5, small), Gradients(nothing, small, small))
    assert errors.whole == pytest.approx({"q": 1e-3, "k": 0.5, "v": 0.0})
    assert errors.row == pytest.approx({"q": 1e-3, "k": 0.5, "v": 0.0})


def test_gradients_of_an_empty_batch_are_right() -> None:
    nothing = Gradients(*(torch.empty(0, 2, 4) for _ in range(3)))
    assert errors_of(nothing, nothing) == Errors(dict.fromkeys("qkv", 0.0), dict.fromkeys("qkv", 0.0))
