"""The public call."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch

from . import call as calls
from . import op
from .backends import Options
from .errors import InputError, UnsupportedError
from .lengths import CuSeqlens
from .mask import Mask
from .plan import Plan, plan
from .ranges import MaxRange, NamedRanges
from .serving import ServingPlan


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: NamedRanges | Plan | ServingPlan = ...,
    *,
    return_lse: Literal[False] = ...,
    cu_seqlens_q: CuSeqlens | None = ...,
    cu_seqlens_k: CuSeqlens | None = ...,
    seqused_k: CuSeqlens | None = ...,
    page_table: torch.Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    max_range: MaxRange = ...,
    mask: Mask | None = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    learnable_sink: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    backend: str | None = ...,
    build: str | None = ...,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: NamedRanges | Plan | ServingPlan = ...,
    *,
    return_lse: Literal[True],
    cu_seqlens_q: CuSeqlens | None = ...,
    cu_seqlens_k: CuSeqlens | None = ...,
    seqused_k: CuSeqlens | None = ...,
    page_table: torch.Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    max_range: MaxRange = ...,
    mask: Mask | None = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    learnable_sink: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    backend: str | None = ...,
    build: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: NamedRanges | Plan | ServingPlan = None,
    *,
    return_lse: bool = False,
    cu_seqlens_q: CuSeqlens | None = None,
    cu_seqlens_k: CuSeqlens | None = None,
    seqused_k: CuSeqlens | None = None,
    page_table: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    max_range: MaxRange = None,
    mask: Mask | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
    build: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact PrefixLM attention: causal, except that the tokens of a range all see each other.

    Two packed sequences of 300 and 600 tokens with one and two images:

        cu = torch.tensor([0, 300, 900], dtype=torch.int32, device="cuda")
        out = attention(q, k, v, [[(4, 260)], [(0, 256), (300, 556)]], cu_seqlens_q=cu, cu_seqlens_k=cu)

    Args:
        q: `(total_q, heads, head_dim)`, or `(batch, seqlen_q, heads, head_dim)`. bfloat16 or float16 on FA4; the
            reference takes any floating point dtype. The last dimension must be contiguous; batched tensors that can't
            be viewed as packed are copied.
        k, v: `(total_k, kv_heads, head_dim)` and `(total_k, kv_heads, head_dim_v)`, or batched. `heads` is a multiple
            of `kv_heads` (GQA, MQA). With a `page_table`: the cache, `(pages, page_size, kv_heads, head_dim)`.
        ranges: the spans, or a `Plan` or `ServingPlan` made once and reused; with a plan, the arguments that went
            into it stay out. In code that `torch.compile` compiles it has to be a plan, made outside of it.
        cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, max_seqlen_q, max_seqlen_k, max_range, mask, backend, build:
            see `plan`.
        softmax_scale: default `1 / sqrt(head_dim)`.
        softcap: scores become `softcap * tanh(scores / softcap)`; 0.0 is off.
        learnable_sink: `(heads,)` logits, one per query head, that join the softmax of every row and carry no value.
        return_lse: also return the log-sum-exp of each row's scores (natural log, the sink included).
        out: where to write the output: contiguous, the output's shape and dtype.

    Returns:
        out, `(total_q, heads, head_dim_v)` or batched, in q's dtype; with `return_lse` also lse, float32
        `(heads, total_q)`, or `(batch, heads, seqlen_q)`. A row that sees no key gives 0 and an LSE of -inf.

    Raises:
        InputError, UnsupportedError: see `plan`; no kernel was launched.
    """
    parts: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_k": seqused_k,
        "page_table": page_table,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "max_range": max_range,
        "mask": mask,
        "backend": backend,
        "build": build,
    }
    ready: Plan | ServingPlan
    if torch.compiler.is_compiling():
        given = ranges if isinstance(ranges, Plan | ServingPlan) else None
        result, lse = op.in_graph(q, k, v, given, parts, softmax_scale, softcap, learnable_sink, out)
        return (result, lse) if return_lse else result
    if isinstance(ranges, Plan | ServingPlan):
        ready = ranges
        for name, value in parts.items():
            if value is not None:
                raise InputError(name, op.SUPERFLUOUS, value)
        spec = described(q, k, v, ready)
    else:
        ready = plan(ranges, like=(q, k, v), **{name: value for name, value in parts.items() if value is not None})
        spec = ready.call
    result, lse = attend(q, k, v, ready, spec, softmax_scale, softcap, learnable_sink, out)
    return (result, lse) if return_lse else result


def described(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ready: Plan | ServingPlan) -> calls.CallSpec:
    """What the tensors are, checked against the plan."""
    spec = calls.describe(q, k, v, paged=ready.call.page_size is not None)
    ready.check(spec)
    return spec


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ready: Plan | ServingPlan,
    spec: calls.CallSpec,
    softmax_scale: float | None,
    softcap: float,
    learnable_sink: torch.Tensor | None,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the options and run the plan: `(out, lse)`. spec: the tensors, that the plan is for."""
    calls.check_sink(learnable_sink, spec)
    calls.check_out(out, spec)
    _check_gradients(spec, learnable_sink, ready)
    options = Options(_scale(softmax_scale, spec), _softcap(softcap), learnable_sink)
    if spec.batched:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out = out.flatten(0, 1) if out is not None else None
    result, lse = ready.prepared.run(q, k, v, options, out)
    if spec.batched:
        result = result.unflatten(0, spec.shape_q)
        lse = lse.unflatten(1, spec.shape_q).transpose(0, 1)
    return result, lse


def _check_gradients(spec: calls.CallSpec, learnable_sink: torch.Tensor | None, ready: Plan | ServingPlan) -> None:
    if ready.choice.backend.differentiable or not torch.is_grad_enabled():
        return
    expected = f"no gradient: backend {ready.choice.name} has no backward yet (torch.no_grad(), or backend='reference')"
    if spec.needs_grad:
        raise UnsupportedError("q, k, v", expected, "requires_grad")
    if learnable_sink is not None and learnable_sink.requires_grad:
        raise UnsupportedError("learnable_sink", expected, "requires_grad")


def _scale(softmax_scale: float | None, spec: calls.CallSpec) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(spec.head_dim)
    # FA4 multiplies masked scores, which are -inf, with it: only a positive scale leaves them so.
    if not isinstance(softmax_scale, int | float) or not math.isfinite(softmax_scale) or softmax_scale <= 0:
        raise InputError("softmax_scale", "a positive finite number", softmax_scale)
    return float(softmax_scale)


def _softcap(softcap: float) -> float:
    if not isinstance(softcap, int | float) or not math.isfinite(softcap) or softcap < 0:
        raise InputError("softcap", "a non-negative finite number, 0.0 for none", softcap)
    return float(softcap)
