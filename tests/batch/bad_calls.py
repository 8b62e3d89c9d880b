"""Calls on the CPU that are right but for what a test changes."""

from __future__ import annotations

import re

import pytest
import torch

import fa4_prefixlm as fp


def qkv(total: int = 10, heads: int = 4, kv_heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32):
    return tuple(torch.randn(total, count, dim, dtype=dtype) for count in (heads, kv_heads, kv_heads))


def cu(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def call(ranges=None, *, tensors=None, cu_q=None, cu_k=None, **options):
    q, k, v = tensors or qkv()
    cu_q = cu(0, 4, 10) if cu_q is None else cu_q
    return fp.attention(q, k, v, ranges, cu_seqlens_q=cu_q, cu_seqlens_k=cu_q if cu_k is None else cu_k, **options)


def rejects(message: str, *arguments, error: type[Exception] = fp.InputError, **options) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(*arguments, **options)
