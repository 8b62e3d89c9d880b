"""Lists of intervals by themselves."""

from __future__ import annotations

import torch

from fa4_prefixlm.geometry import intervals
from fa4_prefixlm.masks.interval_lists import normalised


def test_normalised() -> None:
    lo = torch.tensor([[5, 0, 9, 3], [4, 4, 0, 7], [9, 9, 9, 9]], dtype=torch.int32)
    hi = torch.tensor([[7, 3, 9, 5], [6, 5, 2, 8], [1, 1, 1, 1]], dtype=torch.int32)
    lo, hi = normalised(lo, hi)
    empty = (intervals.EMPTY_LO, intervals.EMPTY_HI)
    assert list(zip(lo[0].tolist(), hi[0].tolist(), strict=True)) == [(0, 7), empty, empty, empty]
    assert list(zip(lo[1].tolist(), hi[1].tolist(), strict=True)) == [(0, 2), (4, 6), (7, 8), empty]
    assert list(zip(lo[2].tolist(), hi[2].tolist(), strict=True)) == [empty] * 4
