"""One interval for each row, from what a mask function says: the usual case in about a third of the operations.

Almost every mask is one run of keys a row: causal or windowed, with the row's own image, without the padding. Whether
that is so is known on the device alone, so it is an answer of its own: `several`. Where it is True the interval is no
good, and `row_bounds` has to be asked.
"""

from __future__ import annotations

import functools
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

# The same for all rows where it is a number.
Edge = torch.Tensor | int


class Run(NamedTuple):
    """`[lo, hi)` of each row, int64 `(batch, q)` or what expands to it, empty where `lo >= hi`.

    Attributes:
        lo, hi: see above.
        several: bool 0-d, some row sees keys that are no single run; None: none does.
        around: where it is not empty, it holds the row's own position.
        full: it is empty for no row.
    """

    lo: Edge
    hi: Edge
    several: torch.Tensor | None = None
    around: bool = True
    full: bool = True


def bounds_of_runs(expression: Expression, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """(bounds int32 `(batch, q, 2)`, counted from the first key; several, bool 0-d).

    Raises:
        NotIntervals: the expression has parts that only `row_bounds` takes.
    """
    run = _run(expression, grid)
    lo, hi = (_counted_from_the_first_key(edge, grid) for edge in (run.lo, run.hi))
    several = run.several
    if several is None:
        several = torch.zeros((), dtype=torch.bool, device=lo.device)
    return torch.stack(emptied(lo, hi), dim=2), several


def _counted_from_the_first_key(edge: Edge, grid: Grid) -> torch.Tensor:
    """int32 `(batch, q)`, within the keys."""
    if isinstance(edge, int):
        number = min(max(edge, grid.kv_offset), grid.kv_end) - grid.kv_offset
        return torch.full(grid.position.shape, number, dtype=torch.int32, device=grid.position.device)
    within = edge.clamp(grid.kv_offset, grid.kv_end)
    return (within - grid.kv_offset if grid.kv_offset else within).to(torch.int32).expand(grid.position.shape)


def _run(expression: Expression, grid: Grid) -> Run:
    position = grid.position
    match expression:
        case Causal():
            return Run(0, position + 1)
        case Everything():
            return Run(0, END_OF_KEYS)
        case Window(size):
            return Run((position - (size - 1)).clamp(min=0), END_OF_KEYS, None, size > 0)
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
            return functools.reduce(_both, (_run(part, grid) for part in parts))
        case AnyOf(parts):
            return functools.reduce(_hull, (_run(part, grid) for part in parts))
    raise NotIntervals(expression)


def _larger(one: Edge, other: Edge) -> Edge:
    if isinstance(one, int):
        return max(one, other) if isinstance(other, int) else other.clamp(min=one)
    return one.clamp(min=other) if isinstance(other, int) else torch.maximum(one, other)


def _smaller(one: Edge, other: Edge) -> Edge:
    if isinstance(one, int):
        return min(one, other) if isinstance(other, int) else other.clamp(max=one)
    return one.clamp(max=other) if isinstance(other, int) else torch.minimum(one, other)


def _either(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one | other


def _both(one: Run, other: Run) -> Run:
    """What both show."""
    around = one.around and other.around
    several = _either(one.several, other.several)
    return Run(
        _larger(one.lo, other.lo), _smaller(one.hi, other.hi), several, around, around and one.full and other.full
    )


def _hull(one: Run, other: Run) -> Run:
    """Both runs as one: an empty one adds nothing, and two that do not touch are `several`."""
    lo, hi, several = _smaller(one.lo, other.lo), _larger(one.hi, other.hi), _either(one.several, other.several)
    around = one.around and other.around  # the own position is in both, so that they touch
    if not around:
        apart = torch.as_tensor(_larger(one.lo, other.lo) > _smaller(one.hi, other.hi))
        for own in (one, other):
            apart = apart if own.full else apart & (own.lo < own.hi)
        several = _either(several, apart.any())
    for own, rest in ((one, other), (other, one)):
        if not own.full:
            empty = torch.as_tensor(own.lo >= own.hi)
            lo, hi = torch.where(empty, rest.lo, lo), torch.where(empty, rest.hi, hi)
    return Run(lo, hi, several, around, one.full or other.full)


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
    slot = ids.to(torch.int64).clamp(-1, width) + 1
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
    return Run(own_start, torch.where(seen, own_stop, 0), several, full=False)


def _real(real: torch.Tensor, grid: Grid) -> Run:
    """The run of True among the keys that are there, the same for every row."""
    here = real[:, grid.kv_offset : grid.kv_end]
    key = torch.arange(grid.kv_offset, grid.kv_offset + here.shape[1], device=real.device)
    lo = torch.where(here, key, END_OF_KEYS).amin(1, keepdim=True)
    hi = torch.where(here, key + 1, 0).amax(1, keepdim=True)
    return Run(lo, hi, (here.sum(1, keepdim=True) != (hi - lo).clamp(min=0)).any(), around=False, full=False)
