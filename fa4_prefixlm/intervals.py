"""What the ranges mean: for every query row the few intervals `[lo, hi)` of the keys it sees.

Built with torch operations that never synchronise, on the device of the lengths: O(tokens) work and memory. Operations
that also run on fake CUDA tensors where torch has no CUDA, so that kernels cross-compile: no `tensor[...]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .algebra import emptied, same_span
from .errors import InputError
from .lengths import Lengths
from .mask import EMPTY_HI, EMPTY_LO, END_OF_KEYS, Intervals, Mask, Reach
from .plain import Plain, outside, plain
from .ranges import Spans, SpanSets
from .span_form import span_form

# Intervals per row that the mask_mods are made for. A mask that may need more runs on the reference.
MOST_INTERVALS = 4


@dataclass(frozen=True)
class Block:
    """A block of tokens that all see each other, by tags: row `i` sees key `j` if `row_tag[i] == key_tag[j]`.

    row_tag: `(total_q,)` int32, the row's sequence if it is in the block, else -1.
    key_tag: `(total_k,)` int32, the key's sequence if it is in the block, else -2.
    """

    row_tag: torch.Tensor
    key_tag: torch.Tensor


@dataclass(frozen=True)
class Bounds:
    """The keys each query row sees, local to its sequence.

    lo, hi: `(total_q, K)` int32. Row `i` sees keys `[lo[i, k], hi[i, k])` for every k; its intervals are disjoint and
    ascending. An empty one is `(EMPTY_LO, EMPTY_HI)`: neutral for the minimum of `lo` and the maximum of `hi` over a
    tile, and no tile that holds an all-empty row can be full.
    block: what the row sees on top of that, None for nearly every mask.

    The dense mask of one sequence without a block, with `kv = torch.arange(seqlen_k)`, is
    `((kv >= lo[:, :, None]) & (kv < hi[:, :, None])).any(1)`.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    block: Block | None = None

    @property
    def count(self) -> int:
        return self.lo.shape[1]

    def shifted(self, offset: torch.Tensor) -> Bounds:
        """The same intervals moved right by `offset` `(total_q,)` int32; empty ones stay as they are."""
        empty, by = self.lo >= self.hi, offset.unsqueeze(1)
        return Bounds(torch.where(empty, self.lo, self.lo + by), torch.where(empty, self.hi, self.hi + by), self.block)

    def visible_pairs(self, where: Tokens) -> torch.Tensor:
        """Number of (query, key) pairs that attend, a 0-d int64 tensor on the device."""
        pairs = (self.hi.long() - self.lo.long()).clamp(min=0).sum()
        if self.block is None:
            return pairs
        tagged = torch.nn.functional.pad((self.block.key_tag >= 0).long().cumsum(0), (1, 0))
        offset = where.key_offset.long()
        everything = tagged.take(offset + where.seqlen_k) - tagged.take(offset)
        empty = self.lo >= self.hi
        lo, hi = (edge.long().masked_fill(empty, 0) + offset.unsqueeze(1) for edge in (self.lo, self.hi))
        counted = (tagged.take(hi) - tagged.take(lo)).masked_fill(empty, 0).sum(1)
        return pairs + ((everything - counted) * (self.block.row_tag >= 0)).sum()


class Tokens(NamedTuple):
    """Where each query token stands, int32 `(total_q,)` each.

    sequence: index of its sequence; key_offset: first row of that sequence in the packed keys; seqlen_k: its number
    of keys; position: the token's own absolute key position, `row + seqlen_k - seqlen_q`.
    """

    sequence: torch.Tensor
    key_offset: torch.Tensor
    seqlen_k: torch.Tensor
    position: torch.Tensor


@dataclass(frozen=True)
class Demand:
    """What a mask with these spans asks of a kernel, known on the host.

    intervals: per row, at most. tagged: with a block of tags beside them. chained: every row sees one interval around
    its own position, so that neighbouring rows see intervals that touch. custom: the mask brings its own kernel code.
    within: every row sees at least what this plain mask shows it, and past that one interval around it.
    plain: the mask is plainly causal or windowed for all rows of the batch.
    """

    intervals: int
    tagged: bool
    chained: bool
    reach: Reach
    custom: bool = False
    within: Plain | None = None
    plain: Plain | None = None


def demand(mask: Mask, spans: SpanSets, lengths: Lengths) -> Demand:
    longest = {name: own.longest for name, own in spans.items()}
    asked = demand_of_any(mask, longest, _most(spans))
    return dataclasses.replace(asked, plain=plain(mask, spans, lengths))


def demand_of_any(mask: Mask, longest: Mapping[str, int], most: Mapping[str, int]) -> Demand:
    """What the mask asks for with any spans: at most `most[name]` in a sequence, of at most `longest[name]` tokens."""
    base, tags = _as_run(mask, most)
    chained = base.centered and base.total and tags is None
    form = span_form(mask)
    return Demand(
        intervals=base.count(most),
        tagged=tags is not None,
        chained=chained,
        reach=base.reach(longest) if chained else Reach(None, None),
        custom=mask.custom_kernel is not None,
        within=outside(form) if form is not None and form.is_causal_outside else None,
        plain=outside(form) if form is not None and form.is_causal_outside and form.inside == form.outside else None,
    )


def measured(mask: Mask, spans: SpanSets, lengths: Lengths, asked: Demand) -> Demand:
    """`asked` with the intervals that rows really see, where the formula's bound is above what kernels take.

    Looks at the values on the host, and only if they are there: nothing synchronises unless the mask does by itself.
    """
    known = lengths.seqlens_q is not None and all(own.host is not None for own in spans.values())
    if asked.intervals <= MOST_INTERVALS or asked.custom or not (known or mask.evaluated):
        return asked
    if not mask.evaluated:
        spans = {name: dataclasses.replace(own, values=own.host_values()) for name, own in spans.items()}
        lengths = lengths.as_on_host()
    bounds = row_bounds(mask, spans, lengths, tokens(lengths))
    seen = (bounds.lo < bounds.hi).sum(1)
    return dataclasses.replace(asked, intervals=max(1, int(seen.max()) if len(seen) else 1))


def in_words(count: int, *, tagged: bool) -> str:
    """What a row sees, for a person: "2 intervals a row and a block of tags"."""
    return f"{count} interval{'s' * (count > 1)} a row{' and a block of tags' * tagged}"


def tokens(lengths: Lengths) -> Tokens:
    cu_q, cu_k = lengths.cu_seqlens_q, lengths.cu_seqlens_k
    row = torch.arange(lengths.total_q, device=lengths.device, dtype=torch.int32)
    sequence = _sequence_of(row, cu_q)
    key_offset = cu_k.index_select(0, sequence)
    key_end, query_end = cu_k.index_select(0, sequence + 1), cu_q.index_select(0, sequence + 1)
    return Tokens(sequence, key_offset, key_end - key_offset, key_end - key_offset - (query_end - row))


def row_bounds(mask: Mask, spans: SpanSets, lengths: Lengths, where: Tokens, most: int | None = None) -> Bounds:
    """Evaluate `mask.intervals` for every query token of the batch, clipped to the keys of its sequence.

    most: intervals that a row is known to see at most. Those past it must be empty, and are dropped.
    """
    rows = TokenRows(where, spans)
    base, tags = _as_run(mask, _most(spans))
    lo, hi = base.intervals(rows)
    if lo.shape != hi.shape or lo.ndim != 2 or lo.shape[0] != len(where.position):
        shapes = f"{tuple(lo.shape)} and {tuple(hi.shape)}"
        raise InputError("mask", f"intervals lo and hi of shape ({len(where.position)}, K) from {mask!r}", shapes)
    _check_within_keys(mask, lo, hi, where)
    lo, hi = clipped(lo.to(torch.int32), hi.to(torch.int32), where.seqlen_k)
    if most is not None and most < lo.shape[1]:
        past = hi.narrow(1, most, hi.shape[1] - most) > EMPTY_HI

        def expected(row: int) -> str:
            return f"at most {most} intervals for row {row}, as {mask!r} counts"

        _require(past.logical_not().all(1), expected, lo, hi, "a row sees more intervals than the mask counts")
        lo, hi = lo.narrow(1, 0, most), hi.narrow(1, 0, most)
    return Bounds(lo, hi, None if tags is None else _block(tags, rows, lengths))


def _check_within_keys(mask: Mask, lo: torch.Tensor, hi: torch.Tensor, where: Tokens) -> None:
    """A row may see up to `END_OF_KEYS`, which stands for the end of its sequence, but no key past it by number."""
    fine = (hi <= where.seqlen_k.unsqueeze(1)) | (hi == END_OF_KEYS) | (lo >= hi)
    fine &= (lo >= 0) | (lo >= hi)

    def expected(row: int) -> str:
        return f"keys within [0, {int(where.seqlen_k[row])}) for row {row} from {mask!r}"

    _require(fine.all(1), expected, lo, hi, "a row sees keys outside of its sequence")


def _require(fine: torch.Tensor, expected: Callable[[int], str], lo: torch.Tensor, hi: torch.Tensor, what: str) -> None:
    """Refuse intervals `(total_q, K)` unless every row is `fine` `(total_q,)`; on the device without synchronising.

    expected: what a row should have been, given its index. what: the same in short, for the device-side assertion.
    """
    if fine.device.type != "cpu":
        torch._assert_async(fine.all(), f"mask: {what}")
    elif not fine.all():
        row = int(fine.logical_not().nonzero()[0])
        raise InputError("mask", expected(row), list(zip(lo[row].tolist(), hi[row].tolist(), strict=True)))


def clipped(lo: torch.Tensor, hi: torch.Tensor, seqlen_k: torch.Tensor) -> Intervals:
    """Clip `(total_q, K)` to `[0, seqlen_k)` and give empty intervals their one form."""
    return emptied(lo.clamp(min=0), torch.minimum(hi, seqlen_k.unsqueeze(1)))


class TokenRows:
    """The `Rows` of a batch: where its tokens stand, and which span each one is in."""

    def __init__(self, where: Tokens, spans: SpanSets) -> None:
        self.position, self.seqlen_k, self.sequence = where.position, where.seqlen_k, where.sequence
        self.spans = spans
        self._latest: dict[str, Intervals] = {}

    def latest_span(self, name: str) -> Intervals:
        if name not in self._latest:
            self._latest[name] = latest_span(self.spans[name], self.sequence, self.position)
        return self._latest[name]

    def span_of(self, name: str) -> Intervals:
        return _containing(self.latest_span(name), self.position)

    def spans_of(self, name: str) -> Intervals:
        start, end = self.spans[name].values.unbind(2)
        start, order = start.masked_fill(end == 0, EMPTY_LO).sort(dim=1)
        end = end.gather(1, order)
        if start.shape[1] == 0:
            start, end = (torch.nn.functional.pad(edge, (0, 1)) for edge in (start, end))
        return emptied(start.index_select(0, self.sequence), end.index_select(0, self.sequence))


def latest_span(spans: Spans, sequence: torch.Tensor, position: torch.Tensor) -> Intervals:
    """Per token `(start, end)` of the last span of its sequence that starts at or before it; spans in any order."""
    batch, width, _ = spans.values.shape
    if batch * width == 0:
        return torch.full_like(position, EMPTY_LO), torch.full_like(position, EMPTY_HI)
    start, end = spans.values.reshape(-1, 2).unbind(1)
    owner = torch.arange(batch, device=start.device).repeat_interleave(width)
    # One sorted list of (sequence, start) serves the whole batch. Unused rows (0, 0) sort before a span at 0.
    key, order = ((owner << 32) + torch.where(end > 0, start, -1)).sort()
    wanted = (sequence.long() << 32) + position
    found = order.take((torch.searchsorted(key, wanted, right=True) - 1).clamp(min=0))
    start, end = start.take(found), end.take(found)
    missing = (owner.take(found) != sequence) | (start > position) | (end == 0)
    return start.masked_fill(missing, EMPTY_LO), end.masked_fill(missing, EMPTY_HI)


def _containing(latest: Intervals, position: torch.Tensor) -> Intervals:
    start, end = latest
    past = position >= end
    return start.masked_fill(past, EMPTY_LO), end.masked_fill(past, EMPTY_HI)


def _most(spans: SpanSets) -> dict[str, int]:
    return {name: own.values.shape[1] for name, own in spans.items()}


def _as_run(mask: Mask, most: Mapping[str, int]) -> tuple[Mask, str | None]:
    """The cheapest form of the mask: (what runs by intervals, the span set that runs by tags).

    most: spans of a sequence, by name.
    A block of at most one span is that span. A block of more spans than intervals fit runs by tags.
    """
    name = mask.block_name()
    if name is None:
        return mask, None
    if most[name] <= 1:
        return mask.without_block() | same_span(name), None
    return (mask.without_block(), name) if mask.count(most) > MOST_INTERVALS else (mask, None)


def _block(name: str, rows: TokenRows, lengths: Lengths) -> Block:
    cu_k = lengths.cu_seqlens_k
    key = torch.arange(lengths.total_k, device=lengths.device, dtype=torch.int32)
    owner = _sequence_of(key, cu_k)
    position = key - cu_k.index_select(0, owner)
    key_inside = _containing(latest_span(rows.spans[name], owner, position), position)[1] > 0
    row_inside = rows.span_of(name)[1] > 0
    return Block(torch.where(row_inside, rows.sequence, -1), torch.where(key_inside, owner, -2))


def _sequence_of(row: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    batch = cu_seqlens.shape[0] - 1
    sequence = torch.searchsorted(cu_seqlens.narrow(0, 1, batch), row, right=True, out_int32=True)
    # A cu_seqlens on the device that ends early would index past the batch. Kernels never visit the tokens after it.
    return sequence.clamp(max=max(batch - 1, 0))
