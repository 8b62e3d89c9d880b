"""What a plan goes through before a backend, on the CPU: lengths, spans, traits, bounds."""

from __future__ import annotations

import dataclasses

import torch

from fa4_prefixlm.batch import lengths, ranges
from fa4_prefixlm.geometry import intervals
from fa4_prefixlm.geometry.traits import Traits, traits
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.testing.batches import Batch


def sizes_of(batch: Batch) -> lengths.Lengths:
    return lengths.packed(
        batch.cu_q,
        batch.cu_k,
        total_q=batch.cu_q[-1],
        total_k=batch.cu_k[-1],
        max_seqlen_q=None,
        max_seqlen_k=None,
        device=torch.device("cpu"),
    )


@dataclasses.dataclass(frozen=True)
class Stages:
    """What a plan goes through, on the CPU."""

    sizes: lengths.Lengths
    spans: ranges.SpanSets
    traits: Traits
    where: intervals.Tokens
    bounds: intervals.Bounds


def prepare(batch: Batch, mask: Mask, spans: ranges.NamedRanges | None = None) -> Stages:
    sizes = sizes_of(batch)
    sets = ranges.parse(mask, batch.spans if spans is None else spans, sizes)
    where = intervals.tokens(sizes)
    return Stages(sizes, sets, traits(mask, sets, sizes), where, intervals.row_bounds(mask, sets, sizes, where))


def dense(bounds: intervals.Bounds, keys: int, rows: slice = slice(None)) -> torch.Tensor:
    """`(rows, keys)` bool of the intervals of rows that belong to one sequence."""
    kv = torch.arange(keys)
    return ((kv >= bounds.lo[rows, :, None]) & (kv < bounds.hi[rows, :, None])).any(1)
