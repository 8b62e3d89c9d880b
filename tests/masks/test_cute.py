"""Masks with a kernel of their own."""

from __future__ import annotations

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.masks import causal, window


def test_a_custom_kernel_runs_its_twin_on_the_reference() -> None:
    from fa4_prefixlm.masks import from_cute

    def kernel(*arguments):
        raise AssertionError("a CuTe mask_mod does not run on the CPU")

    mask = from_cute(kernel, twin=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    q, k, v = (torch.randn(1, 12, heads, 8) for heads in (2, 1, 1))
    assert torch.equal(fp.attention(q, k, v, mask=mask), fp.attention(q, k, v))
    with pytest.raises(fp.InputError, match="twin: expected a function"):
        from_cute(kernel, twin=None)


def test_a_mask_with_its_own_kernel_is_not_combined() -> None:
    from fa4_prefixlm.masks import from_cute

    own = from_cute(lambda *arguments: None, twin=lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (kv_idx % 3 != 1))
    for combine in (lambda: own & window(20), lambda: causal | own, lambda: (causal & own) | window(3)):
        with pytest.raises(fp.InputError, match="mask: expected masks without a kernel of their own"):
            combine()
