"""Memory that holds NaN."""

from __future__ import annotations

import pytest
import torch

from fa4_prefixlm.testing.poison import nan_output, poison_free_memory


def test_an_output_that_nobody_wrote_is_nan() -> None:
    q = torch.zeros(5, 3, 64, dtype=torch.float16)
    out = nan_output(q, 32)
    assert (out.shape, out.dtype) == ((5, 3, 32), torch.float16)
    assert out.isnan().all()
    poison_free_memory("cpu")  # nothing to poison there


@pytest.mark.gpu
def test_memory_that_is_handed_out_next_holds_nan() -> None:
    between = [torch.zeros(384, device="cuda") for _ in range(64)]  # blocks of 1536 bytes, every other one free
    del between[::2]
    poison_free_memory()
    sizes = (300, 300, 4096, 10**6)
    held = [torch.empty(size, device="cuda") for size in sizes]  # before anything else is written there
    assert all(bool(tensor.isnan().all()) for tensor in held)
