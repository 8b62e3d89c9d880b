"""Continuous batching: transformers gathers each request's keys, and says by lengths what belongs together."""

from __future__ import annotations

from typing import Any

import torch

from fa4_prefixlm.device_checks import is_capturing
from fa4_prefixlm.errors import UnsupportedError
from fa4_prefixlm.masks.atoms import causal, window
from fa4_prefixlm.runtime.plans import Plan, plan

# (lengths, window) and tensors of the last forward's layers.
_KEPT = 8
_plans: dict[object, Plan] = {}


@torch.compiler.disable
def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kwargs: dict[str, Any],
    *,
    scaling: float | None,
    softcap: float,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of the requests of a step, each over its own keys. Reads their lengths back, once a layer kind.

    Args:
        q: `(1, tokens, heads, head_dim)`; tokens past the last request are padding, and get 0.
        k, v: `(1, keys, kv_heads, head_dim)`, the same.
        kwargs: `cu_seq_lens_q`, `cu_seq_lens_k` and `sliding_window`.
    """
    if is_capturing():
        expected = "no CUDA graph: continuous batching with use_cuda_graph=False"
        raise UnsupportedError("attention_mask", expected, "a capture")
    ends_q, ends_k = _on_host(kwargs["cu_seq_lens_q"]), _on_host(kwargs["cu_seq_lens_k"])
    size = kwargs.get("sliding_window")
    own = tuple(tensor[0, :end] for tensor, end in ((q, ends_q[-1]), (k, ends_k[-1]), (v, ends_k[-1])))
    name = (ends_q, ends_k, size, *((tensor.shape, tensor.dtype, tensor.device) for tensor in own))
    ready = _plans.get(name)
    if ready is None:
        mask = causal if not isinstance(size, int) else causal & window(size)
        ready = plan(like=own, cu_seqlens_q=list(ends_q), cu_seqlens_k=list(ends_k), mask=mask)
        while len(_plans) >= _KEPT:
            _plans.pop(next(iter(_plans)))
        _plans[name] = ready
    out = q.new_zeros(1, q.shape[1], q.shape[2], v.shape[3])
    out[0, : ends_q[-1]] = ready(*own, softmax_scale=scaling, softcap=softcap, learnable_sink=sink)
    return out


_read: dict[int, tuple[torch.Tensor, int, tuple[int, ...]]] = {}


def _on_host(lengths: torch.Tensor) -> tuple[int, ...]:
    """The values; read once for a tensor and what was last written to it."""
    kept = _read.get(lengths.data_ptr())
    if kept is not None and kept[0] is lengths and kept[1] == lengths._version:
        return kept[2]
    values = tuple(lengths.tolist())
    if len(_read) >= _KEPT:
        _read.clear()
    _read[lengths.data_ptr()] = (lengths, lengths._version, values)
    return values
