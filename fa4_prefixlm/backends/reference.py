"""reference: dense attention in torch, CPU or GPU. The oracle of the tests and the default where FA4 can't run.

It knows nothing of intervals or tiles: the mask comes from the ranges through `Mask.visible`, pair by pair.
O(seqlen_q * seqlen_k) work; scores are computed in chunks of rows. Differentiable (autograd keeps the chunks).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import Backend, MaskedBatch, Prepared
from fa4_prefixlm.batch.lengths import first_query
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.ranges import HostSpans
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry.traits import Traits
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.dense import DensePairs, mask_rows

CHUNK_SCORES = 2**26


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask,
    spans: Mapping[str, HostSpans],
    seqlens: tuple[tuple[int, ...], tuple[int, ...]],
    options: Options,
    starts: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    accumulate: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under a mask, from every pair of tokens.

    A row that sees nothing gives 0 and an LSE of -inf (the sink, if there is one).

    Args:
        q: `(total_q, heads, head_dim)`, packed.
        k, v: `(total_k, kv_heads, head_dim)` and `(total_k, kv_heads, head_dim_v)`, packed.
        mask: the mask.
        spans: by name and sequence, half-open positions.
        seqlens: (seqlens_q, seqlens_k).
        options: scale, softcap and sink.
        starts: (positions of the first queries, of the first keys) by sequence; None: bottom-right alignment.
        accumulate: dtype of the computation.

    Returns:
        `(out, lse)` in dtype `accumulate`: `(total_q, heads, head_dim_v)` and `(heads, total_q)`.
    """
    outs = [q.new_zeros(0, q.shape[1], v.shape[2], dtype=accumulate)]
    if q.shape[0] == 0:  # hangs on all three, so that a batch without tokens has gradients, of zeros
        outs = [(q.sum() + k.sum() + v.sum()).to(accumulate).expand(0, q.shape[1], v.shape[2])]
    lses = [q.new_zeros(q.shape[1], 0, dtype=accumulate)]
    for rows, keys, visible in chunks(q, mask, spans, seqlens, starts):
        with torch.autocast(q.device.type, enabled=False):  # it would run the products in half precision
            own = q[rows].to(accumulate), k[keys].to(accumulate), v[keys].to(accumulate)
            out, lse = attend(*own, visible, options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def chunks(
    q: torch.Tensor,
    mask: Mask,
    spans: Mapping[str, HostSpans],
    seqlens: tuple[tuple[int, ...], tuple[int, ...]],
    starts: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """The batch a few rows at a time: (packed queries, packed keys, which of them see each other)."""
    if starts is None:
        starts = tuple(map(first_query, *seqlens)), (0,) * len(seqlens[1])
    row = key = 0
    for index, (seqlen_q, seqlen_k) in enumerate(zip(*seqlens, strict=True)):
        query_start, key_start = starts[0][index], starts[1][index]
        own = {name: sequences[index] for name, sequences in spans.items()}
        step = max(1, CHUNK_SCORES // max(1, q.shape[1] * seqlen_k))
        for begin in range(0, seqlen_q, step):
            end = min(begin + step, seqlen_q)
            position = torch.arange(begin, end, device=q.device) + query_start
            visible = mask_rows(mask, DensePairs(position, seqlen_k, own, index, key_start))
            yield slice(row + begin, row + end), slice(key, key + seqlen_k), visible
        row, key = row + seqlen_q, key + seqlen_k


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, lse)` of rows of one sequence. visible: `(rows, keys)` bool."""
    rows, heads, _ = q.shape
    grouped = by_key_head(q, k.shape[1])
    scores = torch.einsum("qhgd,khd->hgqk", grouped, k).reshape(heads, rows, k.shape[0]) * options.softmax_scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.learnable_sink is not None:
        sink = options.learnable_sink.to(scores.dtype)[:, None, None].expand(heads, rows, 1)
        scores = torch.cat([scores, sink], dim=2)
    lse = torch.logsumexp(scores, dim=2)
    # A row that sees nothing has lse = -inf: subtracting 0 instead keeps exp(-inf) = 0 rather than NaN.
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])[..., : k.shape[0]]
    weights = weights.reshape(k.shape[1], heads // k.shape[1], rows, k.shape[0])
    return torch.einsum("hgqk,khd->qhgd", weights, v).reshape(rows, heads, v.shape[2]), lse


def by_key_head(tensor: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """`(rows, heads, dim)` as `(rows, kv heads, query heads per kv head, dim)`."""
    return tensor.reshape(tensor.shape[0], heads_kv, -1, tensor.shape[2])


@dataclass
class Dense(Prepared):
    """The batch as it came: nothing is prepared."""

    batch: MaskedBatch

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.batch
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        result, lse = dense_attention(
            q,
            k,
            v,
            mask=batch.mask,
            spans={name: spans.on_host() for name, spans in batch.spans.items()},
            seqlens=batch.lengths.on_host(),
            starts=batch.lengths.starts_on_host(),
            options=options,
            accumulate=accumulate,
        )
        result, lse = result.to(q.dtype), lse.to(torch.float32)
        return (result, lse) if out is None else (out.copy_(result), lse)

    def describe(self) -> list[tuple[str, str]]:
        return [("kernel", f"torch {torch.__version__} on {self.batch.spec.device}, float32 accumulation")]


class Reference(Backend):
    name = "reference"
    summary = "dense torch, every pair of tokens"

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None) -> str | None:
        return None

    def prepare(self, batch: MaskedBatch) -> Dense:
        _ = batch.bounds  # not read, but a mask with wrong intervals is refused here as on every other backend
        return Dense(batch)
