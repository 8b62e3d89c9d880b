"""The mask_mods: a compare per interval of the query's row. One source for every mask, batch and length.

`aux_tensors[0]` is `(rows, K, 2)` int32, the intervals `[lo, hi)` of each query row, padded past the last row by
`launch.PADDING` rows that see nothing, because FA4 evaluates a mask_mod on all rows of a tile, past the end too.
If `tagged`, `aux_tensors[1]` and `[2]` are the tags of rows and keys, padded likewise. `module` is the build they run
on.

`lo <= kv < hi` is written as the single unsigned compare `kv - lo < hi - lo`: keys left of `lo` wrap around to a large
number, and so does every key for an empty interval, `(2**31 - 1, 0)`, whose `hi - lo` is 2**31 + 1. On an H200 this
took windowed kernels from 0.81 to 0.94 (varlen) and from 0.88 to 0.97 (packed) of FA4 causal's TFLOP/s, head dim 128
(benchmarks/results/h200-mask-mod.json).

Cached on purpose: FA4's compile cache goes by the source and the closure of a mask_mod.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute


@functools.cache
def varlen(intervals: int, tagged: bool, module: str) -> Callable[..., Any]:
    """Indices are local to the sequence; its rows and keys begin at its offsets in the packed tensors."""
    utils = importlib.import_module(f"{module}.utils")

    @cute.jit
    def visible_varlen(
        batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any
    ) -> Any:
        bounds = aux_tensors[0]
        row = utils.ssa_to_scalar(q_idx) + seqlen_info.offset_q
        kv = utils.ssa_to_scalar(kv_idx)
        lo = bounds[row, 0, 0]
        seen = cutlass.Uint32(kv - lo) < cutlass.Uint32(bounds[row, 0, 1] - lo)
        for k in cutlass.range_constexpr(1, intervals):
            lo = bounds[row, k, 0]
            seen = seen | (cutlass.Uint32(kv - lo) < cutlass.Uint32(bounds[row, k, 1] - lo))
        if cutlass.const_expr(tagged):
            seen = seen | (aux_tensors[1][row] == aux_tensors[2][kv + seqlen_info.offset_k])
        return utils.scalar_to_ssa(seen, cutlass.Boolean)

    return visible_varlen


@functools.cache
def packed(intervals: int, tagged: bool, module: str) -> Callable[..., Any]:
    """The batch is one sequence, so indices and bounds count packed rows and keys."""
    utils = importlib.import_module(f"{module}.utils")

    @cute.jit
    def visible_packed(
        batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any
    ) -> Any:
        bounds = aux_tensors[0]
        row = utils.ssa_to_scalar(q_idx)
        kv = utils.ssa_to_scalar(kv_idx)
        lo = bounds[row, 0, 0]
        seen = cutlass.Uint32(kv - lo) < cutlass.Uint32(bounds[row, 0, 1] - lo)
        for k in cutlass.range_constexpr(1, intervals):
            lo = bounds[row, k, 0]
            seen = seen | (cutlass.Uint32(kv - lo) < cutlass.Uint32(bounds[row, k, 1] - lo))
        if cutlass.const_expr(tagged):
            seen = seen | (aux_tensors[1][row] == aux_tensors[2][kv])
        return utils.scalar_to_ssa(seen, cutlass.Boolean)

    return visible_packed
