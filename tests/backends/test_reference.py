"""The reference against torch's own attention: SDPA with a dense mask, and FlexAttention on the CPU."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fa4_prefixlm as fp
from fa4_prefixlm.testing.batches import UGLY, Batch, brute_mask, random_batch, random_mask
from fa4_prefixlm.testing.empty_rows import Blind


def run(batch: Batch, mask: fp.Mask, heads=(4, 2), dims=(16, 24), dtype=torch.float64, **options):
    q, k, v = batch.tensors(heads, dims, dtype, "cpu")
    out, lse = fp.attention(
        q, k, v, batch.spans, cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, mask=mask, return_lse=True, **options
    )
    return (q, k, v), out, lse


def per_sequence(batch: Batch):
    for index, ((rows, keys), own) in enumerate(zip(batch.seqlens, batch.spans, strict=True)):
        yield (
            slice(batch.cu_q[index], batch.cu_q[index] + rows),
            slice(batch.cu_k[index], batch.cu_k[index] + keys),
            own,
        )


@pytest.mark.parametrize("seed", range(12))
def test_against_sdpa_with_a_dense_mask(seed: int) -> None:
    rng = random.Random(seed)
    batch, mask = random_batch(rng, longest=90), random_mask(rng)
    (q, k, v), out, lse = run(batch, mask)
    for rows, keys, own in per_sequence(batch):
        if rows.start == rows.stop:
            continue
        visible = brute_mask(mask, rows.stop - rows.start, keys.stop - keys.start, own)
        heads_first = (tensor.transpose(0, 1)[None] for tensor in (q[rows], k[keys], v[keys]))
        wanted = sdpa(*heads_first, attn_mask=visible, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(out[rows], wanted, rtol=1e-10, atol=1e-10)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys].repeat_interleave(2, 1)) / math.sqrt(16)
        wanted_lse = scores.masked_fill(~visible, -math.inf).logsumexp(2)
        torch.testing.assert_close(lse[:, rows].double(), wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [fp.PrefixLM(), fp.PrefixLM(40), fp.PrefixLM(40, clamp=False)], ids=str)
def test_against_flex_attention_with_softcap(mask: fp.PrefixLM) -> None:
    tokens, spans = 256, ((8, 72), (72, 100), (200, 256))
    q, k, v = (torch.randn(1, tokens, heads, 32) for heads in (4, 2, 2))
    owner = torch.full((tokens,), -1)
    for index, (start, end) in enumerate(spans):
        owner[start:end] = index

    def mask_mod(b, h, row, kv):
        joined = (owner[row] == owner[kv]) & (owner[row] >= 0)
        near = row - kv < (mask.window or tokens)
        return ((row >= kv) | joined) & near if mask.clamp else ((row >= kv) & near) | joined

    def softcap(score, b, h, row, kv):
        return 5.0 * torch.tanh(score / 5.0)

    block_mask = create_block_mask(mask_mod, 1, 1, tokens, tokens, device="cpu")
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    wanted = flex_attention(*heads_first, score_mod=softcap, block_mask=block_mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(fp.attention(q, k, v, [spans], mask=mask, softcap=5.0), wanted, rtol=1e-4, atol=1e-4)


def test_a_sink_is_one_more_column_without_a_value() -> None:
    sink = torch.randn(4, dtype=torch.float32)
    batch = UGLY["span at both borders"]
    _, plain, plain_lse = run(batch, fp.PrefixLM())
    _, out, lse = run(batch, fp.PrefixLM(), learnable_sink=sink)
    wanted_lse = torch.logaddexp(plain_lse, sink[:, None])
    torch.testing.assert_close(lse, wanted_lse)
    torch.testing.assert_close(
        out, plain * torch.exp(plain_lse - wanted_lse).T[..., None].double(), rtol=1e-5, atol=1e-5
    )


def test_rows_that_see_nothing() -> None:
    batch = Batch(((300, 300),), (((250, 280),),))
    _, out, lse = run(batch, Blind())
    assert (out[:200] == 0).all()
    assert (lse[:, :200] == -math.inf).all()
    assert torch.isfinite(lse[:, 200]).all()
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0])
    _, out, lse = run(batch, Blind(), learnable_sink=sink)
    assert (out[:200] == 0).all()
    torch.testing.assert_close(lse[:, :200], sink[:, None].expand(4, 200))


def test_gradients() -> None:
    batch = Batch(((7, 9), (5, 5)), (((3, 8),), ((0, 2),)))
    tensors = [tensor.requires_grad_() for tensor in batch.tensors((2, 1), (4, 4), torch.float64, "cpu")]

    def attend(q, k, v):
        return fp.attention(q, k, v, batch.spans, cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, mask=fp.PrefixLM(4))

    assert torch.autograd.gradcheck(attend, tensors)


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fa4_prefixlm.backends import reference

    batch = random_batch(random.Random(3), longest=200)
    _, whole, whole_lse = run(batch, fp.PrefixLM(50))
    monkeypatch.setattr(reference, "CHUNK_SCORES", 500)
    _, out, lse = run(batch, fp.PrefixLM(50))
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse)


def test_batched_and_packed_and_out_agree() -> None:
    q, k, v = torch.randn(3, 20, 4, 8), torch.randn(3, 30, 2, 8), torch.randn(3, 30, 2, 8)
    ranges = [[(0, 12)], [], [(5, 29)]]
    out, lse = fp.attention(q, k, v, ranges, return_lse=True)
    assert out.shape == (3, 20, 4, 8)
    assert lse.shape == (3, 4, 20)
    flat, flat_lse = fp.attention(
        *(tensor.flatten(0, 1) for tensor in (q, k, v)),
        ranges,
        cu_seqlens_q=[0, 20, 40, 60],
        cu_seqlens_k=[0, 30, 60, 90],
        return_lse=True,
    )
    assert torch.equal(out.flatten(0, 1), flat)
    assert torch.equal(lse.transpose(0, 1).flatten(1), flat_lse)
    given = torch.full_like(out, math.nan)
    same = fp.attention(q, k, v, ranges, out=given)
    assert same.data_ptr() == given.data_ptr()
    assert torch.equal(given, out)
    nothing = fp.attention(q[0, :0], k[0, :0], v[0, :0], [], cu_seqlens_q=[0], cu_seqlens_k=[0])
    assert nothing.shape == (0, 4, 8)
    none, none_lse = fp.attention(q[:, :0], k, v, ranges, return_lse=True)
    assert none.shape == (3, 0, 4, 8)
    assert none_lse.shape == (3, 4, 0)


def test_a_query_chunk_is_the_end_of_the_whole() -> None:
    q, k, v = (torch.randn(1, 50, heads, 8) for heads in (4, 2, 2))
    whole = fp.attention(q, k, v, [[(3, 20), (35, 50)]], mask=fp.PrefixLM(10))
    chunk = fp.attention(q[:, 30:], k, v, [[(3, 20), (35, 50)]], mask=fp.PrefixLM(10))
    torch.testing.assert_close(chunk, whole[:, 30:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_reference(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 64, heads, 16) for heads in (4, 2, 2))
    plain = fp.attention(q, k, v, [[(3, 40)]])
    with torch.autocast("cpu", dtype):
        assert torch.equal(fp.attention(q, k, v, [[(3, 40)]]), plain)
