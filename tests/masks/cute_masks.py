"""A CuTe mask_mod as a user would bring it: causal, to keys that a per-key tensor allows. Imports cutlass."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


@cute.jit
def causal_to_allowed_keys(batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    kv = utils.ssa_to_scalar(kv_idx)
    position = utils.ssa_to_scalar(q_idx) + seqlen_info.seqlen_k - seqlen_info.seqlen_q
    allowed = aux_tensors[0][kv + seqlen_info.offset_k]
    return utils.scalar_to_ssa((kv <= position) & (allowed != 0), cutlass.Boolean)
