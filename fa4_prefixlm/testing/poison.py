"""Memory that holds NaN, so that an element which was not written, or was read and should not be, shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

MIB = 2**20
SMALL = MIB  # torch's caching allocator serves requests up to this from segments of their own
# Bytes that there is to be room for, twice each: 1 KiB to 64 MiB.
ROOM = [2**size for size in range(10, 27)]


def nan_output(q: torch.Tensor, head_dim_v: int) -> torch.Tensor:
    """An output for `attention(..., out=)`, all NaN: `q`'s shape with the value head dim, its dtype and device."""
    return torch.full((*q.shape[:-1], head_dim_v), math.nan, dtype=q.dtype, device=q.device)


def poison_free_memory(device: torch.device | str = "cuda") -> None:
    """Let whatever `torch.empty` hands out next on the current stream hold NaN (read as int32: an index far out of
    bounds). GPU only. What it adds to the memory that torch has reserved is the same after one call and after many.
    """
    if torch.device(device).type != "cuda":
        return
    torch.cuda.synchronize(device)
    # A request gets the smallest block that holds it, which may be one between what others hold: each, by its size.
    requests = free_requests(*_memory(device))
    held = _filled(requests, device)
    held += _filled(missing_room(requests), device)
    held += _filled(free_requests(*_memory(device)), device)  # what is left of new segments
    del held


def free_requests(segments: Iterable[Mapping[str, Any]], device: int, stream: int) -> list[int]:
    """Bytes to ask for, one after the other, to be handed out all that is free, outside of CUDA graphs.

    Args:
        segments: `torch.cuda.memory_snapshot()`.
        device, stream: those that will ask.
    """
    found: list[int] = []
    for segment in segments:
        here = (segment["device"], segment["stream"]) == (device, stream)
        if not here or tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0):
            continue
        sizes = [block["size"] for block in segment["blocks"] if block["state"] == "inactive"]
        if segment["segment_type"] == "small":
            for size in sizes:
                found += [SMALL] * (size // SMALL) + ([size % SMALL] if size % SMALL else [])
        else:
            found += [size for size in sizes if size > SMALL]
    return sorted(found, reverse=True)


def missing_room(free: Iterable[int]) -> list[int]:
    """Those of `ROOM`, twice each, that do not fit what is free."""
    small, large = [[own for own in free if (own <= SMALL) == is_small] for is_small in (True, False)]
    missing = []
    for size in (size for size in sorted(ROOM, reverse=True) for _ in range(2)):
        room = small if size <= SMALL else large
        largest = max(range(len(room)), key=room.__getitem__, default=None)
        if largest is None or room[largest] < size:
            missing.append(size)
        else:
            room[largest] -= size
    return missing


def _memory(device: torch.device | str) -> tuple[list[dict[str, Any]], int, int]:
    stream = torch.cuda.current_stream(device)
    return torch.cuda.memory_snapshot(), stream.device_index, stream.cuda_stream


def _filled(sizes: Iterable[int], device: torch.device | str) -> list[torch.Tensor]:
    return [torch.full((size // 4,), math.nan, device=device) for size in sizes]
