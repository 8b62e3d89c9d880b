"""A mask that is known by what each row sees: bounds that somebody else made, as data on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.interval_lists import Intervals, emptied
from fa4_prefixlm.masks.protocols import Pairs, Rows


@dataclass(frozen=True, eq=False, repr=False)
class GivenRows(Mask):
    """Row `i` of sequence `b` sees keys `[bounds[b, i, k], bounds[b, i, n + k])` of its sequence, for every `k < n`.

    A row is known by its number in its sequence, so the batch's positions have to be just that.

    Attributes:
        bounds: `(batch, rows, 2 * n)` int32 on the device. The intervals of a row are disjoint and ascending, and one
            with `lo >= hi` is empty.
    """

    uses_position = False

    bounds: torch.Tensor

    @property
    def names(self) -> frozenset[str]:
        return frozenset()

    def count(self, spans: Mapping[str, int]) -> int:
        return self.bounds.shape[2] // 2

    def intervals(self, rows: Rows) -> Intervals:
        lo, hi = self.bounds.flatten(0, 1).chunk(2, dim=1)
        return emptied(lo, hi)

    def visible(self, pairs: Pairs) -> torch.Tensor:
        lo, hi = self.bounds[pairs.sequence, pairs.query.flatten()].chunk(2, dim=1)
        key = pairs.key.flatten()
        return ((key >= lo.unsqueeze(2)) & (key < hi.unsqueeze(2))).any(1)

    def __repr__(self) -> str:
        batch, rows, columns = self.bounds.shape
        return f"given bounds of {batch} x {rows} rows, {columns // 2} a row"
