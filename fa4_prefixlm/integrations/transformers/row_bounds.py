"""From what a mask function says to the bounds of each row: interval algebra, O(tokens), without synchronising.

Rows are the queries of the whole batch, `(batch * q,)`. A row's keys are a list of at most `MOST_INTERVALS` intervals;
a row that needs more is counted as such, and the bounds are then no good (`Rows.overflow`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fa4_prefixlm.geometry.traits import MOST_INTERVALS
from fa4_prefixlm.integrations.transformers.mask_functions import (
    AllOf,
    AnyOf,
    AtPositions,
    Blocks,
    Causal,
    Chunks,
    Documents,
    Everything,
    Expression,
    Unpadded,
    Window,
    WindowBothWays,
)
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO, END_OF_KEYS, Intervals, emptied, normalised


class Rows(NamedTuple):
    """What the rows see: `lo`, `hi` int32 `(rows, K)`, and whether each has more intervals than fit, bool `(rows,)`."""

    lo: torch.Tensor
    hi: torch.Tensor
    overflow: torch.Tensor


@dataclass(frozen=True)
class Grid:
    """The queries and keys of a forward.

    Attributes:
        position: `(batch, q)` int64, where each query stands.
        kv_offset: the position of the first key.
        kv_length: keys of each sequence.
    """

    position: torch.Tensor
    kv_offset: int
    kv_length: int

    @property
    def kv_end(self) -> int:
        """The position after the last key."""
        return self.kv_offset + self.kv_length


class NotIntervals(Exception):
    """The expression is known, but its rows are no lists of intervals that could be told from its parts."""


def bounds_of(expression: Expression, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """(bounds, overflow) of the whole mask.

    Returns:
        int32 `(batch, q, 2 * n)`, counted from the first key, `lo` before `hi`; and bool 0-d: some row needs more than
        `MOST_INTERVALS`, and the bounds are not its mask.

    Raises:
        NotIntervals: see there.
    """
    found = _rows(expression, grid.position, grid, None)
    lo = (found.lo.clamp(min=grid.kv_offset) - grid.kv_offset).masked_fill(found.lo >= found.hi, EMPTY_LO)
    lo, hi = emptied(lo, found.hi.clamp(max=grid.kv_end) - grid.kv_offset)
    if lo.shape[1] > 1:
        lo, hi = normalised(lo, hi)  # empty ones last
    lo, hi, overflow = _most(lo, hi, found.overflow)
    batch, rows = grid.position.shape
    return torch.cat([lo, hi], dim=1).view(batch, rows, -1), overflow.any()


def first_runs(visible: torch.Tensor, most: int) -> tuple[Intervals, torch.Tensor]:
    """The first `most` runs of True of each row of `(rows, keys)`, and whether there are more of them."""
    keys = visible.shape[1]
    key = torch.arange(keys, device=visible.device, dtype=torch.int32)
    los, his, end = [], [], torch.zeros(visible.shape[0], 1, dtype=torch.int32, device=visible.device)
    for _ in range(most):
        lo = torch.where(visible & (key >= end), key, EMPTY_LO).amin(1, keepdim=True)
        end = torch.where(visible.logical_not() & (key >= lo), key, keys).amin(1, keepdim=True)
        los.append(lo)
        his.append(end.masked_fill(lo == EMPTY_LO, EMPTY_HI))
    return (torch.cat(los, dim=1), torch.cat(his, dim=1)), (visible & (key >= end)).any(1)


def _rows(expression: Expression, position: torch.Tensor, grid: Grid, documents: torch.Tensor | None) -> Rows:
    """What rows at `position` `(batch, q)` see. documents: the ids of a `Documents` that the expression is cut by."""
    flat = position.reshape(-1, 1).to(torch.int32)
    match expression:
        case Causal():
            return _one(torch.zeros_like(flat), flat + 1)
        case Everything():
            return _one(torch.zeros_like(flat), torch.full_like(flat, END_OF_KEYS))
        case Window(size):
            return _one((flat - (size - 1)).clamp(min=0), torch.full_like(flat, END_OF_KEYS))
        case WindowBothWays(size):
            return _one((flat - size).clamp(min=0), flat + size + 1)
        case Chunks(size, left_padding):
            padding = left_padding.to(torch.int32).view(-1, 1).expand_as(position).reshape(-1, 1)
            begin = padding + (flat - padding).div(size, rounding_mode="floor") * size
            return _one(begin.clamp(min=0), begin + size)
        case Blocks(ids):
            return _same_id(ids, position, negative=False)
        case Documents(ids):
            return _same_id(ids, position, negative=True)
        case Unpadded(real):
            return _keys(real, position, grid)
        case AllOf(parts):
            for part in parts:
                if isinstance(part, Documents):
                    documents = part.ids
            return _met([_rows(part, position, grid, documents) for part in parts])
        case AnyOf(parts):
            return _joined([_rows(part, position, grid, documents) for part in parts])
        case AtPositions(inner, positions):
            return _in_documents(inner, positions, position, grid, documents)
    raise NotIntervals(expression)


def _one(lo: torch.Tensor, hi: torch.Tensor) -> Rows:
    return Rows(*emptied(lo, hi), torch.zeros(lo.shape[0], dtype=torch.bool, device=lo.device))


def _met(parts: list[Rows]) -> Rows:
    lo, hi, overflow = parts[0]
    for part in parts[1:]:
        most = lo.shape[1] + part.lo.shape[1] - 1
        lo = torch.maximum(lo.unsqueeze(2), part.lo.unsqueeze(1)).flatten(1)
        hi = torch.minimum(hi.unsqueeze(2), part.hi.unsqueeze(1)).flatten(1)
        lo, hi = emptied(lo, hi) if lo.shape[1] == 1 else normalised(lo, hi)
        # Two disjoint lists of k and l intervals meet in at most k + l - 1.
        lo, hi, overflow = _most(lo[:, :most], hi[:, :most], overflow | part.overflow)
    return Rows(lo, hi, overflow)


def _joined(parts: list[Rows]) -> Rows:
    lo = torch.cat([part.lo for part in parts], dim=1)
    hi = torch.cat([part.hi for part in parts], dim=1)
    overflow = torch.stack([part.overflow for part in parts]).any(0)
    return _most(*normalised(lo, hi), overflow)


def _most(lo: torch.Tensor, hi: torch.Tensor, overflow: torch.Tensor) -> Rows:
    """At most `MOST_INTERVALS` of each row."""
    if lo.shape[1] <= MOST_INTERVALS:
        return Rows(lo, hi, overflow)
    return Rows(lo[:, :MOST_INTERVALS], hi[:, :MOST_INTERVALS], overflow | (hi[:, MOST_INTERVALS:] > EMPTY_HI).any(1))


def _keys(real: torch.Tensor, position: torch.Tensor, grid: Grid) -> Rows:
    """The same keys for every row: the runs of True among those that are there."""
    here = real[:, grid.kv_offset : grid.kv_end].expand(position.shape[0], -1)
    (lo, hi), more = first_runs(here, MOST_INTERVALS)
    hi = torch.where(lo < hi, hi + grid.kv_offset, hi)
    lo = torch.where(lo == EMPTY_LO, lo, lo + grid.kv_offset)
    return Rows(*(tensor.repeat_interleave(position.shape[1], 0) for tensor in (lo, hi, more)))


def _same_id(ids: torch.Tensor, position: torch.Tensor, *, negative: bool) -> Rows:
    """For each row the runs of positions that have its own position's id. negative: negative ids count too."""
    batch, width = position.shape[0], ids.shape[1]
    ids = ids.expand(batch, -1)
    # Sorted by (id, position), each group of an id is a list of runs of neighbouring positions.
    order = ids.argsort(dim=1, stable=True)
    sorted_ids = ids.gather(1, order)
    first = torch.zeros(batch, 1, dtype=torch.bool, device=ids.device).logical_not()
    new_group = torch.cat([first, sorted_ids[:, 1:] != sorted_ids[:, :-1]], dim=1)
    new_run = new_group | torch.cat([first, order[:, 1:] != order[:, :-1] + 1], dim=1)
    last_of_run = torch.cat([new_run[:, 1:], first], dim=1)
    group, run = new_group.cumsum(1) - 1, new_run.cumsum(1)
    rank = run - torch.where(new_group, run, 0).cummax(1).values
    # Where a run does not fit, and where nothing begins or ends, writes go to a column that is cut off.
    room = width * MOST_INTERVALS
    target = group * MOST_INTERVALS + rank
    lo, hi = (
        torch.full((batch, room + 1), empty, dtype=torch.int32, device=ids.device)
        .scatter(1, torch.where(here & (rank < MOST_INTERVALS), target, room), edge.to(torch.int32))[:, :room]
        .reshape(batch, width, MOST_INTERVALS)
        for empty, here, edge in ((EMPTY_LO, new_run, order), (EMPTY_HI, last_of_run, order + 1))
    )
    most_rank = torch.zeros_like(group).scatter_reduce(1, group, rank, "amax")
    group_of = torch.zeros_like(group).scatter(1, order, group)
    at = position.clamp(0, width - 1)
    own = group_of.gather(1, at)
    seen = position < width
    if not negative:
        seen = seen & (ids.gather(1, at) >= 0)
    wide = own.unsqueeze(2).expand(-1, -1, MOST_INTERVALS)
    lo = lo.gather(1, wide).masked_fill(seen.logical_not().unsqueeze(2), EMPTY_LO)
    hi = hi.gather(1, wide).masked_fill(seen.logical_not().unsqueeze(2), EMPTY_HI)
    overflow = (most_rank.gather(1, own) >= MOST_INTERVALS) & seen
    return Rows(lo.flatten(0, 1), hi.flatten(0, 1), overflow.flatten())


def _in_documents(
    inner: Expression, positions: torch.Tensor, position: torch.Tensor, grid: Grid, documents: torch.Tensor | None
) -> Rows:
    """`inner` of positions within documents.

    Within its own document a row's position and those of the keys count alike, so what `inner` shows the row there is
    moved by the distance between the two ways of counting. Outside of it that is wrong: `documents` has to cut it.
    """
    if documents is None:
        raise NotIntervals("positions that restart, without the documents that they belong to")
    own = positions.expand(position.shape[0], -1).gather(1, position)
    lo, hi, overflow = _rows(inner, own, grid, None)
    by = (position - own).reshape(-1, 1).to(torch.int32)
    unbounded = hi == END_OF_KEYS
    hi = torch.where((lo < hi) & unbounded.logical_not(), hi + by, hi)
    lo = torch.where(lo == EMPTY_LO, lo, lo + by)
    return _met([Rows(lo, hi, overflow), _same_id(documents, position, negative=True)])
