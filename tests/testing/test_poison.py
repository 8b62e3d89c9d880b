"""Memory that holds NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fa4_prefixlm.testing.poison import MIB, ROOM, free_requests, missing_room, nan_output, poison_free_memory


def segment(kind: str, *sizes: int, **other: Any) -> dict[str, Any]:
    """Of torch's snapshot: free blocks, with one that is held after each."""
    blocks = [{"size": size, "state": state} for size in sizes for state in ("inactive", "active_allocated")]
    return {"device": 0, "stream": 0, "segment_pool_id": (0, 0), "segment_type": kind, "blocks": blocks, **other}


def test_an_output_that_nobody_wrote_is_nan() -> None:
    q = torch.zeros(5, 3, 64, dtype=torch.float16)
    out = nan_output(q, 32)
    assert (out.shape, out.dtype) == ((5, 3, 32), torch.float16)
    assert out.isnan().all()
    poison_free_memory("cpu")  # nothing to poison there


def test_free_memory_is_asked_for_as_the_allocator_gives_it() -> None:
    ours = [segment("large", 3 * MIB, 20 * MIB), segment("small", 2 * MIB, 1536)]
    # The last one of these is too small for a request to reach it, the others are not ours to ask for.
    others = [segment("large", 5 * MIB, device=1), segment("large", 5 * MIB, stream=7)]
    others += [segment("large", 5 * MIB, segment_pool_id=(0, 1)), segment("large", MIB)]
    assert free_requests([*others, *ours], device=0, stream=0) == [20 * MIB, 3 * MIB, MIB, MIB, 1536]


def test_room_is_made_once() -> None:
    first = missing_room([])
    assert sorted(first) == sorted([*ROOM, *ROOM])
    # The same as whole segments, as the allocator has them once all of it is free again.
    small, large = [2 * MIB] * 3, [size for size in first if size > 10 * MIB] + [20 * MIB] * 2
    free = free_requests([*(segment("small", own) for own in small), *(segment("large", own) for own in large)], 0, 0)
    assert missing_room(free) == []
    assert missing_room([own for own in free if own != 64 * MIB]) == [64 * MIB, 64 * MIB]
    assert missing_room([own for own in free if own > MIB]) == [own for own in first if own <= MIB]


@pytest.mark.gpu
def test_memory_that_is_handed_out_next_holds_nan() -> None:
    between = [torch.zeros(384, device="cuda") for _ in range(64)]  # blocks of 1536 bytes, every other one free
    del between[::2]
    poison_free_memory()
    sizes = (300, 300, 4096, 10**6)
    held = [torch.empty(size, device="cuda") for size in sizes]  # before anything else is written there
    assert all(bool(tensor.isnan().all()) for tensor in held)


@pytest.mark.gpu
def test_poisoning_again_reserves_nothing_more() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.empty(30 * MIB, device="cuda")  # free then, but only to that stream
    poison_free_memory()
    reserved = torch.cuda.memory_reserved()
    for _ in range(10):
        poison_free_memory()
    assert torch.cuda.memory_reserved() == reserved
