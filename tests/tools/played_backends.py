"""Backends that are played in torch: right ones, and ones with the errors that a kernel makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from fa4_prefixlm.backends.base import Backend, MaskedBatch, Prepared
from fa4_prefixlm.backends.reference import attend
from fa4_prefixlm.geometry import intervals
from fa4_prefixlm.testing.accuracy import dense_attention, overlapping_two_pass


@dataclasses.dataclass
class Played(Prepared):
    work: MaskedBatch
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def run(self, q, k, v, options, out):
        result, lse = self.compute(self.work, q, k, v, options)
        result = result.to(q.dtype)
        return (result if out is None else out.copy_(result)), lse.float()

    def describe(self):
        return [("kernel", "played")]


@dataclasses.dataclass
class Player(Backend):
    """A backend that computes what it is told to, on the CPU."""

    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    name = "varlen"
    summary = "played"

    def refusal(self, call, traits, build):
        return None

    def prepare(self, work):
        return Played(work, self.compute)


def by_bounds(work: MaskedBatch, bounds: intervals.Bounds, q, k, v, options):
    """Attention whose rows see the intervals of `bounds`."""
    outs, lses = [], []
    row = key = 0
    for rows, keys in zip(*work.lengths.on_host(), strict=True):
        kv, own = torch.arange(keys), slice(row, row + rows)
        visible = ((kv >= bounds.lo[own, :, None]) & (kv < bounds.hi[own, :, None])).any(1)
        if rows == 0:
            key += keys
            continue
        out, lse = attend(q[own].float(), k[key : key + keys].float(), v[key : key + keys].float(), visible, options)
        outs.append(out)
        lses.append(lse)
        row, key = row + rows, key + keys
    return torch.cat(outs), torch.cat(lses, dim=1)


def right(work: MaskedBatch, q, k, v, options):
    return by_bounds(work, work.bounds, q, k, v, options)


def naive_two_pass(work: MaskedBatch, q, k, v, options):
    spans = {name: own.on_host() for name, own in work.spans.items()}
    seqlens = work.lengths.on_host()
    out = overlapping_two_pass(q, k, v, window=work.mask.window, spans=next(iter(spans.values())), seqlens=seqlens)
    _, lse = dense_attention(q, k, v, mask=work.mask, spans=spans, seqlens=seqlens, options=options)
    return out, lse  # the LSE is right, so that it is the output that is caught


def one_key_short(work: MaskedBatch, q, k, v, options):
    """Rows of a span do not see its last key, which is their own for its last row, and stays."""
    ahead = work.bounds.hi > work.where.position[:, None] + 1
    bounds = dataclasses.replace(work.bounds, hi=work.bounds.hi - ahead.int())
    return by_bounds(work, bounds, q, k, v, options)


def one_key_too_many(work: MaskedBatch, q, k, v, options):
    """Rows of a span see the key after it, where there is one."""
    ahead = work.bounds.hi > work.where.position[:, None] + 1
    hi = torch.minimum(work.bounds.hi + ahead.int(), work.where.seqlen_k[:, None])
    return by_bounds(work, dataclasses.replace(work.bounds, hi=hi), q, k, v, options)


def without_chunk_offset(work: MaskedBatch, q, k, v, options):
    """Rows count from the first query of the sequence, not from its first key."""
    cached = work.lengths.cu_seqlens_k.diff() - work.lengths.cu_seqlens_q.diff()
    where = work.where._replace(position=work.where.position - cached[work.where.sequence.long()])
    bounds = intervals.row_bounds(work.mask, work.spans, work.lengths, where)
    return by_bounds(work, bounds, q, k, v, options)
