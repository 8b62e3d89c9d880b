"""A build of FlashAttention-4 that is only source text."""

from __future__ import annotations

import dataclasses
import pathlib

from fa4_prefixlm.fa4.builds import describe as builds

GOOD = dataclasses.replace(builds.BEST, name="flash-attn-4 9.9")
INTERFACE = """
import torch
from functools import lru_cache


def _flash_attn_fwd({arguments}):
    pass


def _flash_attn_bwd(q, mask_mod):
    raise NotImplementedError("Varlen backward with block sparsity is not yet supported")


@lru_cache
def _validate_head_dims(head_dim: int, head_dim_v: int, compute_capability: int, alignment: int) -> None:
    assert head_dim <= {sm90} if compute_capability == 9 else head_dim <= 128 or (head_dim, head_dim_v) == (192, 128)


def _resolve_causal_local_window(causal, window_size_left, window_size_right, mask_mod=None):
    if mask_mod is not None and not {kept}:
        return False, False, window_size_left, window_size_right
    return causal, False, window_size_left, window_size_right
"""

SPARSITY = """
class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
"""

EVERYTHING = ", ".join(sorted(GOOD.arguments))


def write_build(
    folder: pathlib.Path,
    *,
    arguments: str = EVERYTHING,
    extra: str = "",
    sm90: str = "",
    kept: bool = False,
    widest: int = 256,
) -> builds.Build:
    (folder / "interface.py").write_text(INTERFACE.format(arguments=arguments, kept=kept, sm90=widest) + extra)
    (folder / "block_sparsity.py").write_text(SPARSITY)
    (folder / "flash_fwd_sm90.py").write_text(sm90)
    return builds.describe(folder, GOOD.module, GOOD.name)
