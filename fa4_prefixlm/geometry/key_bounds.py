"""Bounds transposed: for every key the few intervals of query rows that see it, for a backward, which owns keys.

Where the rows of a sequence rise (no row begins or ends before the row above it), one interval of rows sees each key,
and two binary searches a key find it: nothing synchronises. The rows of any other mask are spread out key by key
(`any_key_bounds`), which looks at the device once, for how many intervals that takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.device_checks import is_fake
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.masks.closed_form import ClosedForm, Edges, Inside
from fa4_prefixlm.masks.interval_lists import END_OF_KEYS

FAR = 32  # bits: sequence b's tokens are counted from b << FAR, so that one sorted list serves the whole batch


@dataclass(frozen=True)
class KeyBounds:
    """The query rows that see each key, local to its sequence.

    Attributes:
        begin, end: `(total_k, K)` int32. Key `j` is seen by rows `[begin[j, k], end[j, k])` for every k, which are
            disjoint and ascending; an empty one has `begin >= end`.
        rising: no key's interval begins or ends before that of the key before it in its sequence; then K is 1.

    The dense mask of one sequence, with `row = torch.arange(seqlen_q)`, is
    `((row >= begin[:, :, None]) & (row < end[:, :, None])).any(1).T`.
    """

    begin: torch.Tensor
    end: torch.Tensor
    rising: bool

    @property
    def count(self) -> int:
        return self.begin.shape[1]


def rises(form: ClosedForm | None, lengths: Lengths) -> bool:
    """The host knows that the rows of every sequence rise, and that rows without keys stand before all others.

    A row in a span may begin before its window with the span (`min(left, s)`, which never falls) and end with it. A
    begin that is moved to the left may be moved as far as the window of the row before the span.
    """
    if form is None or not lengths.is_bottom_right:
        return False
    return all(_rises(form.outside, own, form.window) for own in form.inside)


def _rises(outside: Edges, inside: Inside, window: int | None) -> bool:
    begins, ends = (outside.begin, inside.edges.begin), (outside.end, inside.edges.end)
    if begins == ("window", "window or span"):
        rises = window is not None and inside.before <= window
    else:
        rises = outside.begin == inside.edges.begin
    return rises and (outside.end == inside.edges.end or ends in _RISING_ENDS)


# Where a row after a span ends no earlier than the rows in it.
_RISING_ENDS = {("row", "span"), ("row", "window and span"), ("window", "window or span")}


def rising_key_bounds(bounds: Bounds, sequence: torch.Tensor, lengths: Lengths) -> KeyBounds:
    """The transposition of rows of one interval that rise.

    Key `j` is first seen by the first row that ends after it, and last by the last row that begins at or before it.

    Args:
        sequence: `(total_q,)` int32, whose row it is.
    """
    lo, hi = bounds.lo.squeeze(1), bounds.hi.squeeze(1)
    rows = torch.stack([hi, torch.where(lo >= hi, 0, lo)]) + (sequence.long() << FAR)
    key = torch.arange(lengths.total_k, device=lo.device, dtype=torch.int32)
    owner = sequence_of(key, lengths.cu_seqlens_k)
    wanted = (key - lengths.cu_seqlens_k.take(owner)) + (owner << FAR)
    counted = torch.searchsorted(rows, torch.stack([wanted, wanted]), right=True, out_int32=True)
    begin, end = (counted - lengths.cu_seqlens_q.take(owner)).unbind(0)
    return KeyBounds(begin.unsqueeze(1), torch.maximum(begin, end).unsqueeze(1), rising=True)


def any_key_bounds(bounds: Bounds, sequence: torch.Tensor, lengths: Lengths, most: int) -> KeyBounds | int:
    """The transposition of any rows; where a key is seen by more than `most` intervals of rows, how many it takes.

    Synchronises once: how many intervals the keys take decides which kernel runs.
    """
    spread = _Spread(bounds, sequence.long(), lengths)
    if is_fake(bounds.lo):  # cross-compiling
        count, rising = bounds.count, False
    else:
        asked = torch.stack([spread.intervals_per_key(), _is_rising(bounds, sequence).long()]).tolist()
        count, rising = int(asked[0]), bool(asked[1])
    if rising:
        return rising_key_bounds(bounds, sequence, lengths)
    if count > most:
        return count
    begin, end = spread.key_bounds(max(1, count))
    return KeyBounds(begin, end, rising=False)


def sequence_of(token: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Whose token it is, int64; tokens past the batch count as the last sequence's."""
    batch = cu_seqlens.shape[0] - 1
    return torch.searchsorted(cu_seqlens.narrow(0, 1, batch), token, right=True).clamp(max=max(batch - 1, 0))


def _is_rising(bounds: Bounds, sequence: torch.Tensor) -> torch.Tensor:
    """0-d bool on the device: `rising_key_bounds` is exact for these rows."""
    if bounds.count > 1:
        return torch.zeros((), dtype=torch.bool, device=bounds.lo.device)
    empty = bounds.lo >= bounds.hi
    lo, hi = (edge.masked_fill(empty, 0).squeeze(1) for edge in (bounds.lo, bounds.hi))
    falls = (lo.diff() < 0) | (hi.diff() < 0)
    return (falls & (sequence.diff() == 0)).logical_not().all()


class _Spread:
    """Where the intervals of each key begin and end: at rows that see it when the row before, or after, does not."""

    def __init__(self, bounds: Bounds, sequence: torch.Tensor, lengths: Lengths) -> None:
        empty = bounds.lo >= bounds.hi
        lo, hi = bounds.lo.masked_fill(empty, 0).long(), bounds.hi.masked_fill(empty, 0).long()
        total_q, device = len(sequence), lo.device
        border = sequence.diff() != 0
        local = torch.arange(total_q, device=device) - lengths.cu_seqlens_q.long().take(sequence)
        offset = lengths.cu_seqlens_k.long().take(sequence)
        self.total_k = lengths.total_k
        # (the other row's intervals, none of another sequence; the row at which the key's interval begins or ends)
        self.begins = self._pieces(lo, hi, border, offset, before=True), local
        self.ends = self._pieces(lo, hi, border, offset, before=False), local + 1

    def intervals_per_key(self) -> torch.Tensor:
        """0-d int64 on the device: the most intervals of rows that see a key."""
        first, length = self.begins[0]
        steps = torch.zeros(self.total_k + 1, dtype=torch.int64, device=first.device)
        one = (length > 0).long()
        steps = steps.scatter_add(0, torch.where(length > 0, first, 0), one)
        steps = steps.scatter_add(0, torch.where(length > 0, first + length, 0), -one)
        return steps.cumsum(0).amax()

    def key_bounds(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(begin, end), int32 `(total_k, count)` each."""
        begin, end = (self._by_key(*pieces, row, count) for pieces, row in (self.begins, self.ends))
        return begin, end

    @staticmethod
    def _pieces(
        lo: torch.Tensor, hi: torch.Tensor, border: torch.Tensor, offset: torch.Tensor, *, before: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(first packed key, keys) of what each row sees and its neighbour does not, `(total_q * pieces,)` each."""
        blank = torch.zeros_like(lo.narrow(0, 0, 1))
        body = len(lo) - 1
        if before:
            edge = torch.nn.functional.pad(border, (1, 0), value=True)
            other = (torch.cat([blank, side.narrow(0, 0, body)]) for side in (lo, hi))
        else:
            edge = torch.nn.functional.pad(border, (0, 1), value=True)
            other = (torch.cat([side.narrow(0, 1, body), blank]) for side in (lo, hi))
        other_lo, other_hi = (side.masked_fill(edge.unsqueeze(1), 0) for side in other)
        # The neighbour's K intervals leave K + 1 gaps. An empty one goes past all keys, where it cuts nothing off.
        empty = other_lo >= other_hi
        low = other_lo.masked_fill(empty, END_OF_KEYS).sort(dim=1).values
        high = other_hi.masked_fill(empty, END_OF_KEYS).sort(dim=1).values
        gap_lo = torch.nn.functional.pad(high, (1, 0), value=0)
        gap_hi = torch.nn.functional.pad(low, (0, 1), value=END_OF_KEYS)
        first = torch.maximum(lo.unsqueeze(2), gap_lo.unsqueeze(1)).flatten(1)
        length = torch.minimum(hi.unsqueeze(2), gap_hi.unsqueeze(1)).flatten(1) - first
        return (first + offset.unsqueeze(1)).flatten(), length.clamp(min=0).flatten()

    def _by_key(self, first: torch.Tensor, length: torch.Tensor, row: torch.Tensor, count: int) -> torch.Tensor:
        """Every key of every piece gets the piece's row; the rows of a key ascend."""
        capacity = self.total_k * count
        last = length.cumsum(0)
        place = torch.arange(capacity, device=first.device)
        piece = torch.searchsorted(last, place, right=True).clamp(max=len(last) - 1)
        key = first.take(piece) + place - (last - length).take(piece)
        key, order = torch.where(place < last.narrow(0, -1, 1), key, self.total_k).sort(stable=True)
        nth = place - torch.searchsorted(key, key)
        target = torch.where(key < self.total_k, key * count + nth, capacity).clamp(max=capacity)
        at = row.take(piece // (len(length) // len(row))).take(order)
        spread = torch.zeros(capacity + 1, dtype=torch.int64, device=first.device).scatter(0, target, at)
        return spread.narrow(0, 0, capacity).view(self.total_k, count).to(torch.int32)
