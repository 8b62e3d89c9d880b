"""One interval for each row, from what a mask function says: the usual case in a fifth of the operations.

Almost every mask is one run of keys a row: causal or windowed, with the row's own image, without the padding. Whether
that is so is known on the device alone, so it is an answer of its own: `several`. Where it is True the interval is no
good, and `row_bounds` has to be asked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fa4_prefixlm.integrations.transformers.mask_functions import (
    AllOf,
    AnyOf,
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
from fa4_prefixlm.integrations.transformers.row_bounds import Grid, NotIntervals
from fa4_prefixlm.masks.interval_lists import END_OF_KEYS, emptied


class Run(NamedTuple):
    """`[lo, hi)` of each row, int64 `(batch, q)` or what expands to it, empty where `lo >= hi`.

    several: bool 0-d, some row sees keys that are no single run; None: none does.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    several: torch.Tensor | None = None


def bounds_of_runs(expression: Expression, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """(bounds int32 `(batch, q, 2)`, counted from the first key; several, bool 0-d).

    Raises:
        NotIntervals: the expression has parts that only `row_bounds` takes.
    """
    lo, hi, several = _run(expression, grid)
    lo = (lo.clamp(min=grid.kv_offset) - grid.kv_offset).expand_as(grid.position).to(torch.int32)
    hi = (hi.clamp(max=grid.kv_end) - grid.kv_offset).expand_as(grid.position).to(torch.int32)
    if several is None:
        several = torch.zeros((), dtype=torch.bool, device=lo.device)
    return torch.stack(emptied(lo, hi), dim=2), several


def _run(expression: Expression, grid: Grid) -> Run:
    position = grid.position
    zero = position.new_zeros(())
    match expression:
        case Causal():
            return Run(zero, position + 1)
        case Everything():
            return Run(zero, zero + END_OF_KEYS)
        case Window(size):
            return Run((position - (size - 1)).clamp(min=0), zero + END_OF_KEYS)
        case WindowBothWays(size):
            return Run((position - size).clamp(min=0), position + size + 1)
        case Chunks(size, left_padding):
            padding = left_padding.view(-1, 1)
            begin = padding + (position - padding).div(size, rounding_mode="floor") * size
            return Run(begin.clamp(min=0), begin + size)
        case Blocks(ids):
            return _own_id(ids, grid, negative=False)
        case Documents(ids):
            return _own_id(ids, grid, negative=True)
        case Unpadded(real):
            return _real(real, grid)
        case AllOf(parts):
            first, *others = (_run(part, grid) for part in parts)
            for other in others:
                lo, hi = torch.maximum(first.lo, other.lo), torch.minimum(first.hi, other.hi)
                first = Run(lo, hi, _either(first.several, other.several))
            return first
        case AnyOf(parts):
            first, *others = (_run(part, grid) for part in parts)
            for other in others:
                first = _hull(first, other)
            return first
    raise NotIntervals(expression)


def _either(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one | other


def _hull(one: Run, other: Run) -> Run:
    """Both runs as one: an empty one adds nothing, and two that do not touch are `several`."""
    empty, other_empty = one.lo >= one.hi, other.lo >= other.hi
    lo = torch.where(other_empty, one.lo, torch.where(empty, other.lo, torch.minimum(one.lo, other.lo)))
    hi = torch.where(other_empty, one.hi, torch.where(empty, other.hi, torch.maximum(one.hi, other.hi)))
    apart = (torch.maximum(one.lo, other.lo) > torch.minimum(one.hi, other.hi)) & (empty | other_empty).logical_not()
    return Run(lo, hi, _either(_either(one.several, other.several), apart.any()))


def _own_id(ids: torch.Tensor, grid: Grid, *, negative: bool) -> Run:
    """The run of positions with the id of the row's own. negative: negative ids count too."""
    width = ids.shape[1]
    here = torch.arange(width, device=ids.device)
    changes = ids[:, 1:] != ids[:, :-1]
    begins = torch.nn.functional.pad(changes, (1, 0), value=True)
    ends = torch.nn.functional.pad(changes, (0, 1), value=True)
    start = torch.where(begins, here, 0).cummax(1).values
    stop = torch.where(ends, here + 1, width).flip(1).cummin(1).values.flip(1)
    counted = begins if negative else begins & (ids >= 0)
    # Runs of each id, of those that fit a table as long as the row; others would have to be sorted.
    slot = ids.clamp(-1, width) + 1
    runs = torch.zeros(ids.shape[0], width + 2, dtype=torch.int32, device=ids.device)
    runs.scatter_add_(1, slot, counted.to(torch.int32))
    several = (runs > 1).any()
    position = grid.position
    at = position.clamp(0, width - 1)
    rows = position.shape[0]
    own_start, own_stop = (own.expand(rows, -1).gather(1, at) for own in (start, stop))
    seen = position < width
    if not negative:
        seen = seen & (ids.expand(rows, -1).gather(1, at) >= 0)
    return Run(own_start, torch.where(seen, own_stop, 0), several)


def _real(real: torch.Tensor, grid: Grid) -> Run:
    """The run of True among the keys that are there, the same for every row."""
    here = real[:, grid.kv_offset : grid.kv_end]
    key = torch.arange(grid.kv_offset, grid.kv_offset + here.shape[1], device=real.device)
    lo = torch.where(here, key, END_OF_KEYS).amin(1, keepdim=True)
    hi = torch.where(here, key + 1, 0).amax(1, keepdim=True)
    return Run(lo, hi, (here.sum(1, keepdim=True) != (hi - lo).clamp(min=0)).any())
