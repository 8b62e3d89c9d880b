"""Several sets of spans as one tensor, for kernels that look in all of them."""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl


def together(ranges: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, list[int]]:
    """(the spans of all sets side by side; where those of each begin, and the last end).

    ranges: `(batch, spans, 2)` of each set, None where it has none.
    """
    given = [own for own in ranges if own is not None]
    begins = [*itertools.accumulate((0 if own is None else own.shape[1] for own in ranges), initial=0)]
    return (torch.cat(given, dim=1) if len(given) > 1 else given[0] if given else None), begins


def looked_at(sets: Sequence[torch.Tensor], otherwise: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What `set_of` needs of at most four sets: their spans, and its strides, their number, and where sets begin.

    otherwise: an address for kernels that find no spans to load.
    """
    ranges, begins = together(sets)
    last = begins[-1]
    _, second, third, fourth = [*begins[:-1], last, last, last, last][:4]
    strides = (0, 0, 0) if ranges is None else ranges.stride()
    return otherwise if ranges is None else ranges, (*strides, last, second, third, fourth)


@triton.jit
def set_of(index, second, third, fourth):
    """Of which set a span is, of `together`."""
    return (index >= second).to(tl.int32) + (index >= third).to(tl.int32) + (index >= fourth).to(tl.int32)
