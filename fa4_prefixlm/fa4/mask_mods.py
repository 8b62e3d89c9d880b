"""The mask_mods: one compare against the bounds of the query's row. One source for every mask, batch and length.

`aux_tensors[0]` is `(rows, 2)` int32, `[lo, hi)` per query row, padded past the last row by `launch.ROW_PADDING` rows that
see nothing, because FA4 evaluates a mask_mod on all rows of a tile, also those past the end.

`lo <= kv < hi` is written as the single unsigned compare `kv - lo < hi - lo`: keys left of `lo` wrap around to a large
number, and so does every key for a row that sees nothing, `(2**31 - 1, 0)`, whose `hi - lo` is 2**31 + 1. On an H200 this
took windowed kernels from 0.81 to 0.94 (varlen) and from 0.88 to 0.97 (packed) of FA4 causal's TFLOP/s, head dim 128.

Module level on purpose: FA4 keys its compile cache with the source and the closure of a mask_mod.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


@cute.jit
def varlen(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
    """Indices are local to the sequence; the bounds of its rows begin at its offset in the packed queries."""
    bounds = aux_tensors[0]
    row = utils.ssa_to_scalar(q_idx) + seqlen_info.offset_q
    lo = bounds[row, 0]
    keys = cutlass.Uint32(bounds[row, 1] - lo)
    visible = cutlass.Uint32(utils.ssa_to_scalar(kv_idx) - lo) < keys
    return utils.scalar_to_ssa(visible, cutlass.Boolean)


@cute.jit
def packed(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
    """The batch is one sequence, so indices and bounds count packed rows."""
    bounds = aux_tensors[0]
    row = utils.ssa_to_scalar(q_idx)
    lo = bounds[row, 0]
    keys = cutlass.Uint32(bounds[row, 1] - lo)
    visible = cutlass.Uint32(utils.ssa_to_scalar(kv_idx) - lo) < keys
    return utils.scalar_to_ssa(visible, cutlass.Boolean)
