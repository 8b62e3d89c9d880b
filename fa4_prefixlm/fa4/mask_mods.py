"""The mask_mods: two compares against the bounds of the query's row. One source for every mask, batch and length.

`aux_tensors[0]` is `(rows, 2)` int32, `[lo, hi)` per query row, padded past the last row by `ROW_PADDING` rows that see
nothing, because FA4 evaluates a mask_mod on all rows of a tile, also those past the end.

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
    lo = utils.scalar_to_ssa(bounds[row, 0], cutlass.Int32)
    hi = utils.scalar_to_ssa(bounds[row, 1], cutlass.Int32)
    return (kv_idx >= lo) & (kv_idx < hi)


@cute.jit
def packed(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
    """The batch is one sequence, so indices and bounds count packed rows."""
    bounds = aux_tensors[0]
    row = utils.ssa_to_scalar(q_idx)
    lo = utils.scalar_to_ssa(bounds[row, 0], cutlass.Int32)
    hi = utils.scalar_to_ssa(bounds[row, 1], cutlass.Int32)
    return (kv_idx >= lo) & (kv_idx < hi)
