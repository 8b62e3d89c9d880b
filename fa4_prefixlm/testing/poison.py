"""Memory that holds NaN, so that an element which was not written, or was read and should not be, shows."""

from __future__ import annotations

import math

import torch

# Elements of a block, float32: from 1 KiB to 64 MiB, the sizes that the caching allocator hands out again.
BLOCKS = [2**size for size in range(8, 25)]


def nan_output(q: torch.Tensor, head_dim_v: int) -> torch.Tensor:
    """An output for `attention(..., out=)`, all NaN: `q`'s shape with the value head dim, its dtype and device."""
    return torch.full((*q.shape[:-1], head_dim_v), math.nan, dtype=q.dtype, device=q.device)


def poison_free_memory(device: torch.device | str = "cuda") -> None:
    """Let whatever `torch.empty` hands out next hold NaN (read as int32: an index far out of bounds). GPU only."""
    if torch.device(device).type != "cuda":
        return
    torch.cuda.synchronize(device)
    blocks = [torch.full((size,), math.nan, device=device) for size in BLOCKS for _ in range(2)]
    del blocks
