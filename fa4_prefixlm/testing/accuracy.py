"""How exact is an output: the fp64 oracle, the error measure, and the two wrong answers that exactness is for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fa4_prefixlm.backends.reference import dense_attention as _dense_attention
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.ranges import HostSpans, by_name
from fa4_prefixlm.masks import PrefixLM
from fa4_prefixlm.masks.base import Mask

NamedSpans = HostSpans | Mapping[str, HostSpans]
Seqlens = tuple[tuple[int, ...], tuple[int, ...]]


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """`||out - exact|| / ||exact||` in float64; NaN where any element is NaN, infinite where only `exact` is zero."""
    difference = torch.linalg.vector_norm(out.double() - exact.double())
    norm = torch.linalg.vector_norm(exact.double())
    if norm == 0:
        return 0.0 if difference == 0 else math.inf if difference == difference else math.nan
    return float(difference / norm)


def exact_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask,
    spans: NamedSpans,
    seqlens: Seqlens,
    options: Options | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, lse)` in float64 for packed tensors `(total, heads, head_dim)`, straight from the spans (no intervals).

    spans: per sequence, or by name for a mask that reads several sets.
    """
    options = options or Options(q.shape[-1] ** -0.5, 0.0, None)
    return dense_attention(q, k, v, mask=mask, spans=spans, seqlens=seqlens, options=options, accumulate=torch.float64)


@dataclass(frozen=True)
class Gradients:
    """Of packed tensors; sink: None without one."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sink: torch.Tensor | None = None


def exact_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    mask: Mask,
    spans: NamedSpans,
    seqlens: Seqlens,
    options: Options | None = None,
) -> Gradients:
    """The gradients of `(out * dout).sum() + (lse * dlse).sum()` in float64 by autograd, straight from the spans.

    Rows that see nothing have a constant LSE, whatever `dlse` is there.
    """
    options = options or Options(q.shape[-1] ** -0.5)
    sink = options.learnable_sink
    leaves = [own.detach().double().requires_grad_() for own in (q, k, v, *(() if sink is None else (sink,)))]
    if sink is not None:
        options = dataclasses.replace(options, learnable_sink=leaves[3])
    with torch.enable_grad():
        out, lse = exact_attention(*leaves[:3], mask=mask, spans=spans, seqlens=seqlens, options=options)
        loss = (out * dout.double()).sum()
        if dlse is not None:
            sees = lse > float("-inf")
            loss = loss + (lse[sees] * dlse.double()[sees]).sum()
    return Gradients(*torch.autograd.grad(loss, leaves))


def worst_row(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest relative error of one token and head, `(total, heads, head_dim)`; NaN where any element is NaN.

    A row is measured by its own length, or where that is smaller by the root mean square of all rows' lengths: what is
    rounded in it are sums over keys or queries, which cancel in a short row.
    """
    if exact.numel() == 0:
        return 0.0
    difference = torch.linalg.vector_norm(got.double() - exact.double(), dim=-1)
    length = torch.linalg.vector_norm(exact.double(), dim=-1)
    scale = torch.maximum(length, length.square().mean().sqrt())
    return float(torch.where(difference == 0, 0.0, difference / scale).max())


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: Mask, spans: NamedSpans, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`backends.reference.dense_attention`, which takes spans by name, for spans with or without names."""
    named = {name: own or () for name, own in by_name(mask, spans).items()}
    return _dense_attention(q, k, v, mask=mask, spans=named, **options)  # type: ignore[arg-type]


def plain_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int | None, seqlens: Seqlens
) -> torch.Tensor:
    """What a causal kernel computes when it ignores the spans (Gemma 3's flash attention path in transformers 5.23)."""
    options = Options(q.shape[-1] ** -0.5, 0.0, None)
    spans: HostSpans = ((),) * len(seqlens[0])
    out, _ = dense_attention(q, k, v, mask=PrefixLM(window), spans=spans, seqlens=seqlens, options=options)
    return out.to(q.dtype)


def overlapping_two_pass(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int | None, spans: HostSpans, seqlens: Seqlens
) -> torch.Tensor:
    """The wrong answer of vLLM's PR 42175 in its first form: a causal pass and one over the whole span, merged by LSE.

    For the row at position p in span [s, e) both passes hold the keys [s, p], which so count twice.
    """
    options = Options(q.shape[-1] ** -0.5, 0.0, None)
    nothing: HostSpans = ((),) * len(spans)
    out, lse = dense_attention(q, k, v, mask=PrefixLM(window), spans=nothing, seqlens=seqlens, options=options)
    query = key = 0
    for seqlen_q, seqlen_k, own in zip(*seqlens, spans, strict=True):
        for start, end in own:
            first = max(start - (seqlen_k - seqlen_q), 0)
            rows = slice(query + first, query + max(end - (seqlen_k - seqlen_q), first))
            keys = slice(key + start, key + end)
            whole = ((0, end - start),)
            inside, inside_lse = dense_attention(
                q[rows],
                k[keys],
                v[keys],
                mask=PrefixLM(),
                spans=(whole,),
                seqlens=((rows.stop - rows.start,), (end - start,)),
                options=options,
            )
            total = torch.logaddexp(lse[:, rows], inside_lse)
            share = torch.exp(inside_lse - total).T[..., None]
            out[rows] = out[rows] * (1 - share) + inside * share
        query, key = query + seqlen_q, key + seqlen_k
    return out.to(q.dtype)
