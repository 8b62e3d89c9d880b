"""Attention and gradients over the layouts, on the CPU: what the GPU tests hold kernels to."""

from __future__ import annotations

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.geometry.traits import MOST_INTERVALS
from fa4_prefixlm.testing.accuracy import exact_attention, exact_gradients
from tests.masks.layouts import layouts


@pytest.mark.parametrize("name", layouts())
def test_layouts(name: str) -> None:
    mask, batch, spans = layouts()[name]
    q, k, v = (own.requires_grad_() for own in batch.tensors((4, 2), (8, 8), torch.float64, "cpu"))
    plan = fp.plan(spans, like=(q, k, v), cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, mask=mask)
    assert plan.traits.intervals <= MOST_INTERVALS
    named = {own: tuple(map(tuple, sequences)) for own, sequences in spans.items()}
    out = fp.attention(q, k, v, plan)
    exact, _ = exact_attention(q, k, v, mask=mask, spans=named, seqlens=batch.as_seqlens)
    torch.testing.assert_close(out, exact)
    dout = torch.randn_like(out)
    wanted = exact_gradients(q, k, v, dout, mask=mask, spans=named, seqlens=batch.as_seqlens)
    for got, right in zip(torch.autograd.grad(out, (q, k, v), dout), (wanted.q, wanted.k, wanted.v), strict=True):
        torch.testing.assert_close(got, right)
