"""Masks from functions of FlexAttention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

import fa4_prefixlm as fp
from fa4_prefixlm.masks import causal, from_flex, window
from fa4_prefixlm.testing.batches import Batch
from fa4_prefixlm.testing.stages import prepare


def test_from_flex_and_its_errors() -> None:
    q, k, v = (torch.randn(2, 12, heads, 8) for heads in (2, 1, 1))

    def strided(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & ((q_idx - kv_idx) % 4 == 0)

    with pytest.raises(fp.InputError, match=r"at most max_intervals = 2 .* got 3 in the row at position 8 .*\[0, 1\)"):
        fp.attention(q, k, v, mask=from_flex(strided, max_intervals=2))
    out = fp.attention(q, k, v, mask=from_flex(strided, max_intervals=3))
    visible = create_mask(strided, 1, 1, 12, 12, device="cpu")
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=visible, enable_gqa=True)
    torch.testing.assert_close(out, wanted.transpose(1, 2), rtol=1e-4, atol=1e-5)

    calls = []

    def moody(b, h, q_idx, kv_idx):
        calls.append(1)
        return (q_idx >= kv_idx) & (kv_idx >= len(calls) % 2)

    for function, message in (
        (moody, "a pure function of its indices"),
        (lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (h == 0), "one mask for all heads"),
        (lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & ((h < 2) | (kv_idx == q_idx)), "one mask for all heads"),
        (lambda b, h, q_idx, kv_idx: torch.arange(9)[h] <= q_idx, "one mask for all heads"),
        (lambda b, h, q_idx, kv_idx: kv_idx + h <= q_idx, "one mask for all heads"),
        (lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (torch.rand(()) < 0.5), "RuntimeError: vmap"),
        (lambda b, h, q_idx, kv_idx: q_idx >= kv_idx and b == 0, "no if"),
        (lambda b, h, q_idx, kv_idx: True, "mask_mod: expected"),
        (lambda b, q_idx, kv_idx: q_idx >= kv_idx, "TypeError"),
        (lambda b, h, q_idx, kv_idx: q_idx - kv_idx, "a boolean tensor for every pair"),
    ):
        with pytest.raises(fp.InputError, match=message):
            fp.attention(q, k, v, mask=from_flex(function))
    with pytest.raises(fp.InputError, match="mask_mod: expected a function"):
        from_flex("causal")
    with pytest.raises(fp.InputError, match="spans it does not use"):
        fp.attention(q, k, v, [[(0, 3)], []], mask=from_flex(strided))


def test_from_flex_evaluates_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from fa4_prefixlm.masks import flex

    mask = from_flex(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < 9))
    batch = Batch(((50, 50), (20, 33)), ((), ()))
    whole = prepare(batch, mask, {}).bounds
    monkeypatch.setattr(flex, "EVALUATED_PAIRS", 200)
    chunked = prepare(batch, mask, {}).bounds
    assert torch.equal(whole.lo, chunked.lo)
    assert torch.equal(whole.hi, chunked.hi)


def test_a_flex_function_is_never_asked_for_keys_past_its_sequence() -> None:
    batch = Batch(((5, 5), (3, 9), (2, 2)), ((), (), ()))
    offset, allowed = torch.tensor(batch.cu_k[:-1]), torch.arange(batch.cu_k[-1]) % 3 != 1  # indexing past it raises
    mask = from_flex(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & allowed[offset[b] + kv_idx])
    assert prepare(batch, mask, {}).bounds.count == 3
    q, k, v = batch.tensors((2, 1), (8, 8), torch.float32, "cpu")
    assert fp.attention(q, k, v, cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, mask=mask).isfinite().all()


def test_what_is_combined_with_an_evaluated_mask_is_evaluated() -> None:
    asked = from_flex(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    assert (asked & window(3)).evaluated
    assert (causal | (window(3) & asked)).evaluated
    assert not (causal & window(3)).evaluated
