"""A plan counts and prints what it will do."""

from __future__ import annotations

import torch

import fa4_prefixlm as fp
from fa4_prefixlm.testing.batches import brute_mask


def make(mask: fp.PrefixLM, value_dim: int = 16) -> fp.Plan:
    q, k, v = (torch.randn(90, heads, dim) for heads, dim in ((4, 16), (2, 16), (2, value_dim)))
    return fp.plan(
        [[(4, 30)], [(0, 20), (30, 50)]], like=(q, k, v), cu_seqlens_q=[0, 40, 90], cu_seqlens_k=[0, 40, 90], mask=mask
    )


def test_flops_are_exact() -> None:
    for mask in (fp.PrefixLM(), fp.PrefixLM(7), fp.PrefixLM(7, clamp=False)):
        plan = make(mask, value_dim=24)
        pairs = brute_mask(mask, 40, 40, ((4, 30),)).sum() + brute_mask(mask, 50, 50, ((0, 20), (30, 50))).sum()
        assert plan.flops() == 2 * 4 * (16 + 24) * int(pairs)
        assert plan.causal_flops() == 2 * 4 * (16 + 24) * (40 * 41 // 2 + 50 * 51 // 2)
        assert plan.dense_flops() == 2 * 4 * (16 + 24) * (40**2 + 50**2)


def test_causal_flops_of_a_chunk() -> None:
    q, k, v = torch.randn(1, 5, 1, 8), torch.randn(1, 12, 1, 8), torch.randn(1, 12, 1, 8)
    plan = fp.plan(None, like=(q, k, v))
    assert plan.flops() == plan.causal_flops() == 2 * 16 * (8 + 9 + 10 + 11 + 12)


def test_print() -> None:
    text = str(make(fp.PrefixLM(7)))
    assert "PrefixLM(window=7, clamp=True), 1 interval a row" in text
    passed_over = "causal, native, varlen, packed, two_pass, cudnn, flex passed over"
    assert f"reference: dense torch, every pair of tokens ({passed_over})" in text
    assert "varlen: FA4 needs a GPU, the tensors are on cpu" in text
    assert "of plain causal" in text
    assert repr(make(fp.PrefixLM(7))) == "<Plan reference, 2 sequences, PrefixLM(window=7, clamp=True)>"


def test_masks_are_values() -> None:
    assert fp.PrefixLM(7) == fp.PrefixLM(window=7, clamp=True)
    assert len({fp.PrefixLM(7), fp.PrefixLM(7), fp.PrefixLM(7, clamp=False)}) == 2


def test_ranges_as_a_tensor_and_as_lists_are_the_same() -> None:
    q, k, v = (torch.randn(2, 40, heads, 16) for heads in (4, 2, 2))
    lists = fp.attention(q, k, v, [[(30, 40), (2, 10)], [(0, 40)]])
    tensor = torch.tensor([[[0, 0], [30, 40], [2, 10]], [[0, 40], [0, 0], [0, 0]]], dtype=torch.int32)
    assert torch.equal(fp.attention(q, k, v, tensor), lists)
    none = fp.attention(q, k, v)
    assert torch.equal(fp.attention(q, k, v, [[], []]), none)
    assert torch.equal(fp.attention(q, k, v, torch.zeros(2, 0, 2, dtype=torch.int32)), none)
