"""From what a mask function says to the bounds of each row: interval algebra, O(tokens), without synchronising.

Rows are the queries of the whole batch, `(batch * q,)`. A row's keys are a list of intervals: of a part of the mask at
most `MOST_ON_THE_WAY`, of the whole `MOST_INTERVALS`. A row that needs more is counted as such, and the bounds are then
no good (`Rows.overflow`).
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

# Intervals of a row that a part of a mask may have. Other parts may take them away again, or join them.
MOST_ON_THE_WAY = 16


class Rows(NamedTuple):
    """What the rows see: `lo`, `hi` int32 `(rows, K)`, and whether each has more intervals than fit, bool `(rows,)`.

    A row's intervals are disjoint and ascending, with empty ones, `(EMPTY_LO, EMPTY_HI)`, anywhere between.
    """

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
    lo, hi = normalised(lo, found.hi.clamp(max=grid.kv_end) - grid.kv_offset)  # empty ones last
    lo, hi, overflow = _most(lo, hi, found.overflow, MOST_INTERVALS)
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
    """What all of them show."""
    overflow = torch.stack([part.overflow for part in parts]).any(0)
    one, several = ([part for part in parts if (part.lo.shape[1] > 1) == more] for more in (False, True))
    lo, hi, _ = (several or one).pop()
    for part in one:
        lo, hi = torch.maximum(lo, part.lo), torch.minimum(hi, part.hi)
    lo, hi = emptied(lo, hi)
    if several:
        lo, hi = _in_all([(lo, hi), *((part.lo, part.hi) for part in several)])
    return _most(lo, hi, overflow, MOST_ON_THE_WAY)


def _in_all(parts: list[Intervals]) -> Intervals:
    """The keys that are in an interval of each part: where intervals cover them as deep as there are parts."""
    ends = [hi.masked_fill(lo >= hi, EMPTY_LO) for lo, hi in parts]
    edges = torch.cat([*ends, *(lo for lo, _ in parts)], dim=1)  # at one key, what ends does so first
    width = edges.shape[1] // 2
    edges, order = edges.sort(dim=1, stable=True)
    depth = torch.where(order < width, -1, 1).cumsum(1, dtype=torch.int32)
    outside = depth != len(parts)
    hi = torch.nn.functional.pad(edges[:, 1:], (0, 1)).masked_fill(outside, EMPTY_HI)
    lo, order = edges.masked_fill(outside, EMPTY_LO).sort(dim=1)
    most = width - len(parts) + 1  # two disjoint lists of k and l intervals meet in at most k + l - 1
    return lo[:, :most], hi.gather(1, order)[:, :most]


def _joined(parts: list[Rows]) -> Rows:
    """What some of them show."""
    lo = torch.cat([part.lo for part in parts], dim=1)
    hi = torch.cat([part.hi for part in parts], dim=1)
    overflow = torch.stack([part.overflow for part in parts]).any(0)
    return _most(*normalised(lo, hi), overflow, MOST_ON_THE_WAY)


def _most(lo: torch.Tensor, hi: torch.Tensor, overflow: torch.Tensor, most: int) -> Rows:
    """At most `most` of each row, of ascending ones, the empty ones last."""
    if lo.shape[1] <= most:
        return Rows(lo, hi, overflow)
    return Rows(lo[:, :most], hi[:, :most], overflow | (hi[:, most:] > EMPTY_HI).any(1))


def _keys(real: torch.Tensor, position: torch.Tensor, grid: Grid) -> Rows:
    """The same keys for every row: the runs of True among those that are there."""
    here = real[:, grid.kv_offset : grid.kv_end].expand(position.shape[0], -1)
    changes = here[:, 1:] != here[:, :-1]
    begins = torch.nn.functional.pad(changes, (1, 0), value=True) & here
    ends = torch.nn.functional.pad(changes, (0, 1), value=True) & here
    run = begins.cumsum(1) - 1
    key = torch.arange(grid.kv_offset, grid.kv_offset + here.shape[1], device=real.device, dtype=torch.int32)
    # Where a run does not fit, and where nothing begins or ends, writes go to a column that is cut off.
    lo, hi = (
        torch.full((here.shape[0], MOST_ON_THE_WAY + 1), empty, dtype=torch.int32, device=real.device).scatter(
            1, run.masked_fill(edge.logical_not(), MOST_ON_THE_WAY).clamp(max=MOST_ON_THE_WAY), keys.expand(here.shape)
        )[:, :-1]
        for empty, edge, keys in ((EMPTY_LO, begins, key), (EMPTY_HI, ends, key + 1))
    )
    more = run[:, -1] >= MOST_ON_THE_WAY
    return Rows(*(tensor.repeat_interleave(position.shape[1], 0) for tensor in (lo, hi, more)))


def _same_id(ids: torch.Tensor, position: torch.Tensor, *, negative: bool) -> Rows:
    """For each row the runs of positions that have its own position's id. negative: negative ids count too."""
    batch, width = position.shape[0], ids.shape[1]
    ids = ids.expand(batch, -1)
    # Sorted by (id, position), each group of an id is a list of runs of neighbouring positions.
    order = ids.argsort(dim=1, stable=True)
    sorted_ids = ids.gather(1, order)
    changes = sorted_ids[:, 1:] != sorted_ids[:, :-1]
    breaks = changes | (order[:, 1:] != order[:, :-1] + 1)
    new_group, new_run = (torch.nn.functional.pad(own, (1, 0), value=True) for own in (changes, breaks))
    last_of_group, last_of_run = (torch.nn.functional.pad(own, (0, 1), value=True) for own in (changes, breaks))
    run = new_run.cumsum(1) - 1
    first = torch.where(new_group, run, 0).cummax(1).values
    last = torch.where(last_of_group, run, width).flip(1).cummin(1).values.flip(1)
    # The edges of all runs, and of each position the first and the last run of its group. Where nothing begins or ends,
    # writes go to a column that nobody reads.
    lo, hi = (
        torch.zeros(batch, width + 1, dtype=torch.int32, device=ids.device).scatter(
            1, run.masked_fill(here.logical_not(), width), edge.to(torch.int32)
        )
        for here, edge in ((new_run, order), (last_of_run, order + 1))
    )
    at = position.clamp(0, width - 1)
    own_first, own_last = (torch.zeros_like(run).scatter(1, order, own).gather(1, at) for own in (first, last))
    seen = position < width
    if not negative:
        seen = seen & (ids.gather(1, at) >= 0)
    own_last = own_last.masked_fill(seen.logical_not(), -1)
    own = own_first.unsqueeze(2) + torch.arange(MOST_ON_THE_WAY, device=ids.device)
    unused = own > own_last.unsqueeze(2)
    own = own.clamp(max=width).flatten(1)
    lo, hi = (
        edge.gather(1, own).view(unused.shape).masked_fill(unused, empty)
        for edge, empty in ((lo, EMPTY_LO), (hi, EMPTY_HI))
    )
    overflow = own_last - own_first >= MOST_ON_THE_WAY
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
    everywhere = Grid(position, 0, grid.kv_end)  # a document counts from 0, wherever the keys begin
    lo, hi, overflow = _rows(inner, own, everywhere, None)
    by = (position - own).reshape(-1, 1).to(torch.int32)
    unbounded = hi == END_OF_KEYS
    hi = torch.where((lo < hi) & unbounded.logical_not(), hi + by, hi)
    lo = torch.where(lo == EMPTY_LO, lo, lo + by)
    return _met([Rows(lo, hi, overflow), _same_id(documents, position, negative=True)])
