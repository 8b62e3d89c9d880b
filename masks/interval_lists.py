"""Lists of half-open key intervals, a row of tensors each: the form in which a mask answers, and their union.

`(lo, hi)` are int32 `(total_q, K)`: a row has the intervals `[lo[k], hi[k])`, and `lo >= hi` is an empty one.
"""

from __future__ import annotations

import torch

EMPTY_LO = torch.iinfo(torch.int32).max
EMPTY_HI = 0
# Stands for the end of a sequence's keys, wherever that is.
END_OF_KEYS = torch.iinfo(torch.int32).max

Intervals = tuple[torch.Tensor, torch.Tensor]


def emptied(lo: torch.Tensor, hi: torch.Tensor) -> Intervals:
    """Empty intervals in their one form, `(EMPTY_LO, EMPTY_HI)`."""
    empty = lo >= hi
    return lo.masked_fill(empty, EMPTY_LO), hi.masked_fill(empty, EMPTY_HI)


def normalised(lo: torch.Tensor, hi: torch.Tensor) -> Intervals:
    """The union of a row's intervals `(total_q, K)` as disjoint ascending ones that do not touch; empty ones last."""
    lo, hi = emptied(lo, hi)
    if lo.shape[1] <= 1:
        return lo, hi
    lo, order = lo.sort(dim=1)
    hi = hi.gather(1, order)
    furthest = hi.cummax(dim=1).values
    before = torch.cat([torch.full_like(furthest.narrow(1, 0, 1), -1), furthest.narrow(1, 0, lo.shape[1] - 1)], dim=1)
    group = (lo > before).cumsum(1) - 1
    merged_lo = torch.full_like(lo, EMPTY_LO).scatter_reduce(1, group, lo, "amin")
    merged_hi = torch.full_like(hi, EMPTY_HI).scatter_reduce(1, group, hi, "amax")
    return merged_lo, merged_hi
