"""The public call."""

from __future__ import annotations

from typing import Literal, TypedDict, overload

import torch
from typing_extensions import Unpack

from fa4_prefixlm.batch.arguments import BatchArguments
from fa4_prefixlm.batch.lengths import CuSeqlens
from fa4_prefixlm.batch.ranges import MaxRange, NamedRanges
from fa4_prefixlm.batch.tensors import describe
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.prefix_lm import PrefixLM
from fa4_prefixlm.runtime import torch_ops
from fa4_prefixlm.runtime.callable_plan import CallablePlan
from fa4_prefixlm.runtime.execute import run
from fa4_prefixlm.runtime.plans import Plan, find_build, plan_for
from fa4_prefixlm.runtime.serving_plans import ServingPlan

DEFAULT_MASK = PrefixLM()


class _Arguments(TypedDict, total=False):
    """The keyword arguments of `attention`, but for `return_lse`, which decides what it returns."""

    cu_seqlens_q: CuSeqlens | None
    cu_seqlens_k: CuSeqlens | None
    seqused_k: CuSeqlens | None
    page_table: torch.Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    max_range: MaxRange
    mask: Mask | None
    softmax_scale: float | None
    softcap: float
    learnable_sink: torch.Tensor | None
    out: torch.Tensor | None
    backend: str | None
    backward: str | None
    build: str | None
    deterministic: bool | None


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: NamedRanges | Plan | ServingPlan = ...,
    *,
    return_lse: Literal[False] = ...,
    **arguments: Unpack[_Arguments],
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: NamedRanges | Plan | ServingPlan = ...,
    *,
    return_lse: Literal[True],
    **arguments: Unpack[_Arguments],
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
    backward: str | None = None,
    build: str | None = None,
    deterministic: bool | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact PrefixLM attention: causal, except that the tokens of a range all see each other.

    Two packed sequences of 300 and 600 tokens with one and two images:

        cu = torch.tensor([0, 300, 900], dtype=torch.int32, device="cuda")
        out = attention(q, k, v, [[(4, 260)], [(0, 256), (300, 556)]], cu_seqlens_q=cu, cu_seqlens_k=cu)

    Args:
        q: `(total_q, heads, head_dim)`, or `(batch, seqlen_q, heads, head_dim)`. bfloat16 or float16 on FA4; flex
            takes float32 too, and the reference any floating point dtype. The last dimension must be contiguous;
            batched tensors that can't be viewed as packed are copied.
        k, v: `(total_k, kv_heads, head_dim)` and `(total_k, kv_heads, head_dim_v)`, or batched. `heads` is a multiple
            of `kv_heads` (GQA, MQA). With a `page_table`: the cache, `(pages, page_size, kv_heads, head_dim)`.
        ranges: the spans, or a `Plan` or `ServingPlan` made once and reused; with a plan, the arguments that went
            into it stay out. In code that `torch.compile` compiles it has to be a plan, made outside of it.
        cu_seqlens_q, cu_seqlens_k, seqused_k, page_table: see `plan`.
        max_seqlen_q, max_seqlen_k, max_range, mask, backend, backward, build: see `plan`.
        softmax_scale: positive and finite; default `1 / sqrt(head_dim)`.
        softcap: scores become `softcap * tanh(scores / softcap)`; finite and not negative, 0.0 is off.
        learnable_sink: `(heads,)` logits, one per query head, that join the softmax of every row and carry no value;
            float32, bfloat16 or float16 (float64 where q is), on q's device.
        return_lse: also return the log-sum-exp of each row's scores (natural log, the sink included).
        out: where to write the output: contiguous, the output's shape and dtype. Not where a gradient is needed.
        deterministic: gradients are the same bits in every run; a backward that can't is refused before the forward.
            None: as `torch.use_deterministic_algorithms` says.

    Returns:
        out, `(total_q, heads, head_dim_v)` or batched, in q's dtype; with `return_lse` also lse, float32
        `(heads, total_q)`, or `(batch, heads, seqlen_q)`. A row that sees no key gives 0 and an LSE of -inf.

    Raises:
        InputError: see `plan`; or an option is out of its range, or what goes into a plan is given beside one. No
            kernel was launched.
        UnsupportedError: see `plan`; or a gradient is needed of keys in pages, which the reference alone has, or a
            `deterministic` one of a named backward that has none; or "cudnn" was named and there is a softcap or a
            sink. No kernel was launched.
    """
    of_the_batch = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_k": seqused_k,
        "page_table": page_table,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "max_range": max_range,
    }
    beside_a_plan = {**of_the_batch, "mask": mask, "backend": backend, "backward": backward, "build": build}
    if torch.compiler.is_compiling():
        ready = ranges if isinstance(ranges, CallablePlan) else None
        options = (softmax_scale, softcap, learnable_sink, out, deterministic)
        pair = torch_ops.in_graph(q, k, v, ready, beside_a_plan, *options)
        return pair if return_lse else pair[0]
    spec = None
    if isinstance(ranges, CallablePlan):
        ready = ranges
        for name, value in beside_a_plan.items():
            if value is not None:
                raise InputError(name, torch_ops.PART_OF_THE_PLAN, value)
    else:
        batch = BatchArguments(ranges, **of_the_batch).checked()  # type: ignore[arg-type]
        spec = describe(q, k, v, cache=batch.cache)
        own_mask = DEFAULT_MASK if mask is None else mask
        names = ("auto" if name is None else name for name in (backend, backward))
        ready = plan_for(spec, batch, own_mask, find_build(build), *names)
    pair = run(
        ready,
        q,
        k,
        v,
        spec=spec,
        softmax_scale=softmax_scale,
        softcap=softcap,
        learnable_sink=learnable_sink,
        out=out,
        deterministic=deterministic,
    )
    return pair if return_lse else pair[0]
