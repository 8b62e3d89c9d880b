"""reference: dense attention in torch, CPU or GPU. The oracle of the tests and the default where FA4 can't run.

It knows nothing of intervals or tiles: the mask comes from the ranges through `Mask.visible`, pair by pair.
O(seqlen_q * seqlen_k) work; the score matrix is made in chunks of rows. Differentiable (autograd keeps the chunks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..call import CallSpec
from ..fa4.build import Build
from ..intervals import Demand
from ..mask import Mask
from ..ranges import HostSpans, SequenceSpans
from .base import Backend, Options, Prepared, Work

CHUNK_SCORES = 2**26

SequenceSets = Mapping[str, SequenceSpans]


class DensePairs:
    """The `Pairs` of rows at `position` against all keys of a sequence, by looking at every span."""

    def __init__(self, position: torch.Tensor, seqlen_k: int, spans: SequenceSets, sequence: int = 0) -> None:
        self.query, self.key = position[:, None], torch.arange(seqlen_k, device=position.device)[None]
        self.spans, self._sequence = spans, sequence

    @property
    def sequence(self) -> int:
        return self._sequence

    def same_span(self, name: str) -> torch.Tensor:
        result = torch.zeros(len(self.query), self.key.shape[1], dtype=torch.bool, device=self.key.device)
        for start, end in self.spans[name]:
            result |= _inside(self.query, start, end) & _inside(self.key, start, end)
        return result

    def query_in(self, name: str) -> torch.Tensor:
        return self._in_any(self.query, name)

    def key_in(self, name: str) -> torch.Tensor:
        return self._in_any(self.key, name)

    def before_end_of_latest(self, name: str) -> torch.Tensor:
        end = torch.zeros_like(self.query)
        for start, own_end in sorted(self.spans[name]):
            end = torch.where(self.query >= start, own_end, end)
        return self.key < end

    def _in_any(self, position: torch.Tensor, name: str) -> torch.Tensor:
        result = torch.zeros_like(position, dtype=torch.bool)
        for start, end in self.spans[name]:
            result |= _inside(position, start, end)
        return result


def dense_mask(mask: Mask, seqlen_q: int, seqlen_k: int, spans: SequenceSets) -> torch.Tensor:
    """The boolean mask `(seqlen_q, seqlen_k)` of one sequence with the spans `{name: ((start, end), ...)}`."""
    position = torch.arange(seqlen_k - seqlen_q, seqlen_k)
    return _mask_rows(mask, DensePairs(position, seqlen_k, spans))


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask,
    spans: Mapping[str, HostSpans],
    seqlens: tuple[tuple[int, ...], tuple[int, ...]],
    options: Options,
    accumulate: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, lse)` of packed tensors `(total, heads, head_dim)`, both in dtype `accumulate`; lse is `(heads, total_q)`.

    spans: by name and sequence, half-open. seqlens: (seqlens_q, seqlens_k). A row that sees nothing gives 0 and an LSE
    of -inf (the sink, if there is one).
    """
    outs = [q.new_zeros(0, q.shape[1], v.shape[2], dtype=accumulate)]
    lses = [q.new_zeros(q.shape[1], 0, dtype=accumulate)]
    row = key = 0
    for index, (seqlen_q, seqlen_k) in enumerate(zip(*seqlens, strict=True)):
        own = {name: sequences[index] for name, sequences in spans.items()}
        keys, values = k[key : key + seqlen_k].to(accumulate), v[key : key + seqlen_k].to(accumulate)
        step = max(1, CHUNK_SCORES // max(1, q.shape[1] * seqlen_k))
        for begin in range(0, seqlen_q, step):
            end = min(begin + step, seqlen_q)
            position = torch.arange(begin, end, device=q.device) + (seqlen_k - seqlen_q)
            visible = _mask_rows(mask, DensePairs(position, seqlen_k, own, index))
            with torch.autocast(q.device.type, enabled=False):  # it would run the products in half precision
                out, lse = _attend(q[row + begin : row + end].to(accumulate), keys, values, visible, options)
            outs.append(out)
            lses.append(lse)
        row, key = row + seqlen_q, key + seqlen_k
    return torch.cat(outs), torch.cat(lses, dim=1)


def _mask_rows(mask: Mask, pairs: DensePairs) -> torch.Tensor:
    return mask.visible(pairs).expand(len(pairs.query), pairs.key.shape[1])


def _inside(position: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return (position >= start) & (position < end)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, _ = q.shape
    grouped = q.reshape(rows, k.shape[1], -1, q.shape[2])  # (rows, kv heads, query heads per kv head, head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, k).reshape(heads, rows, -1) * options.softmax_scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.learnable_sink is not None:
        sink = options.learnable_sink.to(scores.dtype)[:, None, None].expand(heads, rows, 1)
        scores = torch.cat([scores, sink], dim=2)
    lse = torch.logsumexp(scores, dim=2)
    # A row that sees nothing has lse = -inf: subtracting 0 instead keeps exp(-inf) = 0 rather than NaN.
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])[..., : k.shape[0]]
    weights = weights.reshape(k.shape[1], -1, rows, k.shape[0])
    return torch.einsum("hgqk,khd->qhgd", weights, v).reshape(rows, heads, -1), lse


@dataclass
class Dense(Prepared):
    work: Work

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        work = self.work
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        result, lse = dense_attention(
            q,
            k,
            v,
            mask=work.mask,
            spans={name: spans.on_host() for name, spans in work.spans.items()},
            seqlens=work.lengths.on_host(),
            options=options,
            accumulate=accumulate,
        )
        result, lse = result.to(q.dtype), lse.to(torch.float32)
        return (result, lse) if out is None else (out.copy_(result), lse)

    def describe(self) -> list[tuple[str, str]]:
        return [("kernel", f"torch {torch.__version__} on {self.work.call.device}, float32 accumulation")]


class Reference(Backend):
    name = "reference"
    summary = "dense torch, every pair of tokens"
    differentiable = True

    def refusal(self, call: CallSpec, demand: Demand, build: Build | None) -> str | None:
        return None

    def prepare(self, work: Work) -> Dense:
        return Dense(work)
