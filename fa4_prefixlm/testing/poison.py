"""Memory that holds NaN, so that an element which was not written, or was read and should not be, shows."""

from __future__ import annotations

import math

import torch

# Bytes of new blocks, from 1 KiB to 64 MiB, beside those that the caching allocator has.
NEW_BLOCKS = [2**size for size in range(10, 27)]


def nan_output(q: torch.Tensor, head_dim_v: int) -> torch.Tensor:
    """An output for `attention(..., out=)`, all NaN: `q`'s shape with the value head dim, its dtype and device."""
    return torch.full((*q.shape[:-1], head_dim_v), math.nan, dtype=q.dtype, device=q.device)


def poison_free_memory(device: torch.device | str = "cuda") -> None:
    """Let whatever `torch.empty` hands out next hold NaN (read as int32: an index far out of bounds). GPU only."""
    if torch.device(device).type != "cuda":
        return
    torch.cuda.synchronize(device)
    # A request gets the smallest block that holds it, which may be one between what others hold: each, by its size.
    sizes = [*sorted(_free_blocks(), reverse=True), *(size for size in NEW_BLOCKS for _ in range(2))]
    blocks = [torch.full((size // 4,), math.nan, device=device) for size in sizes]
    del blocks


def _free_blocks() -> list[int]:
    """Bytes of each block that the caching allocator has to hand out, outside of CUDA graphs."""
    return [
        block["size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]
