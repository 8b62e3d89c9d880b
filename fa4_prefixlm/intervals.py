"""What the ranges mean: for every query row one interval `[lo, hi)` of the keys it sees.

Built with torch operations that never synchronise, on the device of the lengths: O(tokens) work and memory. Operations
that also run on fake CUDA tensors where torch has no CUDA, so that kernels cross-compile: no `tensor[...]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .lengths import Lengths
from .mask import Mask, Rows
from .ranges import Spans

EMPTY_LO = torch.iinfo(torch.int32).max
EMPTY_HI = 0


@dataclass(frozen=True)
class Bounds:
    """The keys each query row sees, local to its sequence.

    lo, hi: `(total_q,)` int32. Row `i` sees keys `[lo[i], hi[i])`. A row that sees nothing is `(EMPTY_LO, EMPTY_HI)`:
    neutral for the minimum of `lo` and the maximum of `hi` over a tile, and no tile that holds it can be full.

    The dense mask of one sequence is `(kv >= lo[:, None]) & (kv < hi[:, None])` with `kv = torch.arange(seqlen_k)`.
    """

    lo: torch.Tensor
    hi: torch.Tensor

    def visible_pairs(self) -> torch.Tensor:
        """Number of (query, key) pairs that attend, a 0-d int64 tensor on the device."""
        return (self.hi.long() - self.lo.long()).clamp(min=0).sum()

    def shifted(self, offset: torch.Tensor) -> Bounds:
        """The same intervals moved right by `offset` `(total_q,)` int32; rows that see nothing stay as they are."""
        empty = self.lo >= self.hi
        return Bounds(torch.where(empty, self.lo, self.lo + offset), torch.where(empty, self.hi, self.hi + offset))


class Tokens(NamedTuple):
    """Where each query token stands, int32 `(total_q,)` each.

    sequence: index of its sequence; key_offset: first row of that sequence in the packed keys; seqlen_k: its number
    of keys; position: the token's own absolute key position, `row + seqlen_k - seqlen_q`.
    """

    sequence: torch.Tensor
    key_offset: torch.Tensor
    seqlen_k: torch.Tensor
    position: torch.Tensor


def tokens(lengths: Lengths) -> Tokens:
    cu_q, cu_k = lengths.cu_seqlens_q, lengths.cu_seqlens_k
    row = torch.arange(lengths.total_q, device=lengths.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_q.narrow(0, 1, lengths.batch), row, right=True, out_int32=True)
    # A cu_seqlens on the device that ends early would index past the batch. Kernels never visit the tokens after it.
    sequence = sequence.clamp(max=max(lengths.batch - 1, 0))
    key_offset = cu_k.index_select(0, sequence)
    key_end, query_end = cu_k.index_select(0, sequence + 1), cu_q.index_select(0, sequence + 1)
    return Tokens(sequence, key_offset, key_end - key_offset, key_end - key_offset - (query_end - row))


def row_bounds(mask: Mask, spans: Spans, where: Tokens) -> Bounds:
    """Evaluate `mask.bounds` for every query token of the batch, clipped to the keys of its sequence."""
    span_start, span_end = containing_span(spans, where)
    lo, hi = mask.bounds(Rows(where.position, where.seqlen_k, span_start, span_end))
    return canonical(lo.to(torch.int32), hi.to(torch.int32), where.seqlen_k)


def canonical(lo: torch.Tensor, hi: torch.Tensor, seqlen_k: torch.Tensor) -> Bounds:
    """Clip to `[0, seqlen_k)` and give rows that see nothing their one representation."""
    lo = lo.clamp(min=0)
    hi = torch.minimum(hi, seqlen_k)
    empty = lo >= hi
    return Bounds(lo.masked_fill(empty, EMPTY_LO), hi.masked_fill(empty, EMPTY_HI))


def containing_span(spans: Spans, where: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Per query token the span that holds it, `[position, position + 1)` if none does. Spans may come in any order."""
    batch, width, _ = spans.values.shape
    if batch * width == 0:
        return where.position, where.position + 1
    start, end = spans.values.reshape(-1, 2).unbind(1)
    owner = torch.arange(batch, device=start.device).repeat_interleave(width)
    # One sorted list of (sequence, start) serves the whole batch. Unused rows (0, 0) sort before a span at 0.
    key, order = ((owner << 32) + torch.where(end > 0, start, -1)).sort()
    wanted = (where.sequence.long() << 32) + where.position
    found = order.take((torch.searchsorted(key, wanted, right=True) - 1).clamp(min=0))
    start, end = start.take(found), end.take(found)
    inside = (owner.take(found) == where.sequence) & (start <= where.position) & (where.position < end)
    return torch.where(inside, start, where.position), torch.where(inside, end, where.position + 1)
