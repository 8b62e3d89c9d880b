"""What the ranges mean: for every query row the few intervals `[lo, hi)` of keys that it sees.

Built on the device of the lengths with torch operations that never synchronise: O(tokens) work and memory. All of them
run on fake CUDA tensors too, where torch has no CUDA, so that kernels cross-compile; `tensor[...]` would not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.ranges import Spans, SpanSets
from fa4_prefixlm.device_checks import assert_on_device
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.geometry.traits import as_run, most_spans
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO, END_OF_KEYS, Intervals, emptied


@dataclass(frozen=True)
class Tags:
    """Tokens that all see each other, in any number of spans: row `i` sees key `j` if `row_tag[i] == key_tag[j]`.

    Attributes:
        row_tag: `(total_q,)` int32 on the device, the row's sequence if the row is in a span, else -1.
        key_tag: `(total_k,)` int32 on the device, the key's sequence if the key is in a span, else -2.
    """

    row_tag: torch.Tensor
    key_tag: torch.Tensor


@dataclass(frozen=True)
class Bounds:
    """The keys each query row sees, local to its sequence.

    Row `i` sees keys `[lo[i, k], hi[i, k])` for every k; its intervals are disjoint and ascending. An empty one is
    `(EMPTY_LO, EMPTY_HI)`: neutral for the minimum of `lo` and the maximum of `hi` over a tile, and no tile that holds
    an all-empty row can be full.

    The dense mask of one sequence without tags, with `kv = torch.arange(seqlen_k)`, is
    `((kv >= lo[:, :, None]) & (kv < hi[:, :, None])).any(1)`.

    Attributes:
        lo, hi: `(total_q, K)` int32 on the device.
        tags: what the row sees besides; None for nearly every mask.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    tags: Tags | None = None

    @property
    def count(self) -> int:
        return self.lo.shape[1]

    def shifted(self, offset: torch.Tensor) -> Bounds:
        """The same intervals moved right by `offset` `(total_q,)` int32; empty ones stay as they are."""
        empty, by = self.lo >= self.hi, offset.unsqueeze(1)
        return Bounds(torch.where(empty, self.lo, self.lo + by), torch.where(empty, self.hi, self.hi + by), self.tags)

    def visible_pairs(self, where: Tokens) -> torch.Tensor:
        """Number of (query, key) pairs that attend, a 0-d int64 tensor on the device."""
        pairs = (self.hi.long() - self.lo.long()).clamp(min=0).sum()
        if self.tags is None:
            return pairs
        tagged = torch.nn.functional.pad((self.tags.key_tag >= 0).long().cumsum(0), (1, 0))
        offset = where.key_offset.long()
        everything = tagged.take(offset + where.seqlen_k) - tagged.take(offset)
        empty = self.lo >= self.hi
        lo, hi = (edge.long().masked_fill(empty, 0) + offset.unsqueeze(1) for edge in (self.lo, self.hi))
        counted = (tagged.take(hi) - tagged.take(lo)).masked_fill(empty, 0).sum(1)
        return pairs + ((everything - counted) * (self.tags.row_tag >= 0)).sum()


class Tokens(NamedTuple):
    """The place of each query token, int32 `(total_q,)` on the device each.

    Attributes:
        sequence: index of its sequence.
        key_offset: first row of that sequence in the packed keys.
        seqlen_k: its number of keys.
        position: the token's own position.
        key_start: the position of its sequence's first key; None: 0 everywhere.
        row: its row of the packed queries; None: these are all of them.
    """

    sequence: torch.Tensor
    key_offset: torch.Tensor
    seqlen_k: torch.Tensor
    position: torch.Tensor
    key_start: torch.Tensor | None = None
    row: torch.Tensor | None = None

    def row_of(self, index: int) -> int:
        """The row of one of the tokens."""
        return index if self.row is None else int(self.row[index])

    @property
    def key_end(self) -> torch.Tensor:
        """The position after its sequence's last key."""
        return self.seqlen_k if self.key_start is None else self.seqlen_k + self.key_start


def tokens(lengths: Lengths, row: torch.Tensor | None = None) -> Tokens:
    """The places of the query tokens of a batch, or of these rows of its packed queries, int32 on its device."""
    cu_q, cu_k, given = lengths.cu_seqlens_q, lengths.cu_seqlens_k, row
    if row is None:
        row = torch.arange(lengths.total_q, device=lengths.device, dtype=torch.int32)
    sequence = _sequence_of(row, cu_q)
    key_offset = cu_k.index_select(0, sequence)
    key_start = None if lengths.key_start is None else lengths.key_start.index_select(0, sequence)
    # Row `cu_seqlens_q[b] + i` has the position `query_start[b] + i`.
    base = lengths.query_starts() - cu_q.narrow(0, 0, lengths.batch)
    return Tokens(
        sequence,
        key_offset,
        cu_k.index_select(0, sequence + 1) - key_offset,
        row + base.index_select(0, sequence),
        key_start,
        given,
    )


def row_bounds(
    mask: Mask,
    spans: SpanSets,
    lengths: Lengths,
    where: Tokens,
    most: int | None = None,
    latest: LatestSpan | None = None,
    *,
    with_tags: bool = True,
) -> Bounds:
    """Evaluate `mask.intervals` for every query token of the batch, clipped to the keys of its sequence.

    Args:
        most: intervals that a row is known to see at most. Any past it must be empty, and are dropped.
        latest: what finds the spans of tokens; None: `latest_span`.
        with_tags: False: leave out the tags of a mask that has them.

    Raises:
        InputError: the mask gives intervals of a wrong shape, past the keys, or more than `most` (on a GPU the values
            are checked by an assertion on the device).
    """
    rows = TokenRows(where, spans, latest_span if latest is None else latest)
    base, tagged = as_run(mask, most_spans(spans))
    lo, hi = base.intervals(rows)
    if lo.shape != hi.shape or lo.ndim != 2 or lo.shape[0] != len(where.position):
        shapes = f"{tuple(lo.shape)} and {tuple(hi.shape)}"
        raise InputError("mask", f"intervals lo and hi of shape ({len(where.position)}, K) from {mask!r}", shapes)
    if lengths.is_aligned:  # else there may be keys that are not here
        _check_within_keys(mask, lo, hi, where)
    lo, hi = clipped(lo.to(torch.int32), hi.to(torch.int32), where)
    bounds = Bounds(lo, hi, _tags(tagged, rows, lengths) if tagged is not None and with_tags else None)
    return bounds if most is None else at_most(most, mask, bounds, where)


def at_most(most: int, mask: Mask, bounds: Bounds, where: Tokens) -> Bounds:
    """The bounds as `most` intervals a row; any past them must be empty, see `row_bounds`."""
    lo, hi = bounds.lo, bounds.hi
    if most >= bounds.count:
        return bounds
    past = hi.narrow(1, most, bounds.count - most) > EMPTY_HI

    def expected(index: int) -> str:
        return f"at most {most} intervals for row {where.row_of(index)}, as {mask!r} counts"

    _require(past.logical_not().all(1), expected, lo, hi, "a row sees more intervals than the mask counts")
    return Bounds(lo.narrow(1, 0, most), hi.narrow(1, 0, most), bounds.tags)


def _check_within_keys(mask: Mask, lo: torch.Tensor, hi: torch.Tensor, where: Tokens) -> None:
    """An interval may end at `END_OF_KEYS`, which means the end of the sequence, but at no other number past it."""
    fine = (hi <= where.key_end.unsqueeze(1)) | (hi == END_OF_KEYS) | (lo >= hi)
    fine &= (lo >= 0) | (lo >= hi)

    def expected(index: int) -> str:
        return f"keys within [0, {int(where.key_end[index])}) for row {where.row_of(index)} from {mask!r}"

    _require(fine.all(1), expected, lo, hi, "a row sees keys outside of its sequence")


def _require(fine: torch.Tensor, expected: Callable[[int], str], lo: torch.Tensor, hi: torch.Tensor, what: str) -> None:
    """Refuse intervals unless every row is fine; on a GPU by an assertion that does not synchronise.

    Args:
        fine: bool, one of each row.
        expected: what a row should have been, given its index in `fine`.
        lo, hi: int32, K of each row, for the message.
        what: what is wrong, for the assertion on the device.
    """
    if fine.device.type != "cpu":
        assert_on_device(fine.all(), f"mask: {what}")
    elif not fine.all():
        row = int(fine.logical_not().nonzero()[0])
        raise InputError("mask", expected(row), list(zip(lo[row].tolist(), hi[row].tolist(), strict=True)))


def clipped(lo: torch.Tensor, hi: torch.Tensor, where: Tokens) -> Intervals:
    """Intervals of positions `(total_q, K)` as intervals of the sequence's own keys, which count from 0.

    Intervals without keys become `(EMPTY_LO, EMPTY_HI)`.
    """
    if where.key_start is not None:
        start = where.key_start.unsqueeze(1)
        lo, hi = torch.maximum(lo, start) - start, torch.minimum(hi, where.key_end.unsqueeze(1)) - start
    return emptied(lo.clamp(min=0), torch.minimum(hi, where.seqlen_k.unsqueeze(1)))


# (spans of a set, each token's sequence, its position) -> as `latest_span`.
LatestSpan = Callable[[Spans, torch.Tensor, torch.Tensor], Intervals]


class TokenRows:
    """The `Rows` of a batch: the positions of its tokens, and the span that each one is in."""

    def __init__(self, where: Tokens, spans: SpanSets, find: LatestSpan) -> None:
        self.find = find
        self.position, self.seqlen_k, self.sequence = where.position, where.key_end, where.sequence
        self.spans = spans
        self._latest: dict[str, Intervals] = {}

    def latest_span(self, name: str) -> Intervals:
        if name not in self._latest:
            self._latest[name] = self.find(self.spans[name], self.sequence, self.position)
        return self._latest[name]

    def span_of(self, name: str) -> Intervals:
        return _containing(self.latest_span(name), self.position)

    def spans_of(self, name: str) -> Intervals:
        start, end = self.spans[name].values.unbind(2)
        start, order = start.masked_fill(end == 0, EMPTY_LO).sort(dim=1)
        end = end.gather(1, order)
        start, end = start.index_select(0, self.sequence), end.index_select(0, self.sequence)
        return emptied(start, torch.minimum(end, self.seqlen_k.unsqueeze(1)))  # those to come are not here yet


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


def tags_of(name: str, spans: SpanSets, lengths: Lengths, where: Tokens, latest: LatestSpan = latest_span) -> Tags:
    """The tags of a batch, whose rows in spans of `name` all see each other."""
    return _tags(name, TokenRows(where, spans, latest), lengths)


def _tags(name: str, rows: TokenRows, lengths: Lengths) -> Tags:
    cu_k = lengths.cu_seqlens_k
    key = torch.arange(lengths.total_k, device=lengths.device, dtype=torch.int32)
    owner = _sequence_of(key, cu_k)
    position = key - cu_k.index_select(0, owner)
    if lengths.key_start is not None:
        position = position + lengths.key_start.index_select(0, owner)
    key_inside = _containing(rows.find(rows.spans[name], owner, position), position)[1] > 0
    row_inside = rows.span_of(name)[1] > 0
    return Tags(torch.where(row_inside, rows.sequence, -1), torch.where(key_inside, owner, -2))


def _sequence_of(row: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    batch = cu_seqlens.shape[0] - 1
    sequence = torch.searchsorted(cu_seqlens.narrow(0, 1, batch), row, right=True, out_int32=True)
    # A cu_seqlens on the device that ends early would index past the batch. Kernels never visit the tokens after it.
    return sequence.clamp(max=max(batch - 1, 0))
