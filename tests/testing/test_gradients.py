"""What says how exact gradients are."""

from __future__ import annotations

import math

import pytest
import torch

from fa4_prefixlm.testing.accuracy import worst_row
from fa4_prefixlm.testing.gradients import Errors

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
