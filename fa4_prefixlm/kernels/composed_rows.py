"""The bounds of all rows of masks put together of plain atoms, from lengths and spans, in one launch.

The same as `geometry.intervals.row_bounds` in every bit. The mask is data: two compiled kernels, for up to four parts
and for more, run all that `masks.plain_parts.few_parts` takes. Nothing here synchronises on a GPU.

A row goes through its sequence's keys in steps. What it sees stays the same until a part of the mask begins or ends to
show it something; that is where the next step goes.
"""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.ranges import SpanSets
from fa4_prefixlm.device_checks import integers_to_device
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.geometry.tiles import ceil_div
from fa4_prefixlm.kernels.launch import Launcher
from fa4_prefixlm.kernels.search import row_place
from fa4_prefixlm.kernels.span_sets import looked_at, set_of
from fa4_prefixlm.masks.interval_lists import END_OF_KEYS
from fa4_prefixlm.masks.plain_parts import MOST_PARTS, MOST_TERMS, FewParts, Kind

ROWS = 32
CONSTANTS = {"SPANS_AT_ONCE": 16, "END": END_OF_KEYS}
# Parts and terms that a kernel is compiled for.
SIZES = (4, max(MOST_PARTS, MOST_TERMS))
# Rows times the spans of a step times steps; beyond, other ways are as fast. A set of 128 spans and 16384 rows.
MOST_WORK = 2**28
# A step counts the spans of each set that hold a key, in eight bits. They do not overlap, unless they are bad.
MOST_SPANS = 256
FINE = "spans and lengths with which no row sees keys outside of its sequence, or more intervals than the mask counts"


def takes(parts: FewParts, spans: SpanSets, lengths: Lengths) -> bool:
    """The batch is of the kind that the kernel works on, and not too much for it."""
    if not lengths.is_aligned or lengths.batch == 0 or lengths.total_q == 0:
        return False
    widths = [spans[name].values.shape[1] for name in parts.names]
    return sum(widths) <= MOST_SPANS and lengths.total_q * sum(widths[: parts.key_sets]) ** 2 <= MOST_WORK


def composed_rows(parts: FewParts, spans: SpanSets, lengths: Lengths, most: int) -> Bounds:
    """The bounds of a batch that `takes` is true of, whose tensors are on the device.

    Values that the host does not know are checked by an assertion on the device, on the CPU (Triton's interpreter) by
    an `InputError`, as far as `row_bounds` checks them.

    Args:
        parts: the mask.
        spans: those of each set that it reads.
        lengths: with bottom-right alignment, and keys from position 0.
        most: intervals of a row, at most.
    """
    total_q, device = lengths.total_q, lengths.device
    checked = not lengths.known or any(spans[name].host is None for name in parts.names)
    lo, hi = (torch.empty(total_q, most, dtype=torch.int32, device=device) for _ in range(2))
    fine = torch.ones(1, dtype=torch.bool, device=device) if checked else lo
    table = _table(parts, lo.device, _stream(lo.device))
    ranges, numbers = looked_at([spans[name].values for name in parts.names], lo)
    key_spans = sum(spans[name].values.shape[1] for name in parts.names[: parts.key_sets])
    with torch.cuda.device_of(lo):
        launch_composed_rows(
            ceil_div(total_q, ROWS),
            (lo, hi, fine, table, lengths.cu_seqlens_q, lengths.cu_seqlens_k, ranges),
            (
                *numbers,
                key_spans,
                len(parts.terms),
                _changes(parts) + 3,
                total_q,
                lengths.batch,
                lengths.batch.bit_length(),
                most,
            ),
            {"ROWS": ROWS, "CHECKED": checked, "SIZE": _size(parts), **CONSTANTS},
        )
        if checked:
            _require(fine)
    return Bounds(lo, hi)


def _require(fine: torch.Tensor) -> None:
    if fine.is_cuda:
        torch._assert_async(fine, f"mask: expected {FINE}")
    elif not fine:
        raise InputError("mask", FINE, "other values")


def _stream(device: torch.device) -> int:
    # As Triton itself asks: a `torch.cuda.Stream` made for its number takes ten times as long.
    return int(torch._C._cuda_getCurrentRawStream(device.index)) if device.type == "cuda" else 0


def _size(parts: FewParts) -> int:
    return SIZES[max(len(parts.parts), len(parts.terms)) > SIZES[0]]


@functools.lru_cache(maxsize=256)
def _table(parts: FewParts, device: torch.device, stream: int) -> torch.Tensor:
    """The mask as the kernel reads it: each part's kind, set, left and right, then terms as bits of parts.

    It is copied once for a stream, on which what reads it comes after the copy.
    """
    size = _size(parts)
    columns = [
        (int(own.kind), parts.names.index(own.name) if own.name else 0, own.left, own.right) for own in parts.parts
    ]
    columns += [(int(Kind.WINDOW), 0, END_OF_KEYS, END_OF_KEYS)] * (size - len(columns))  # it shows everything
    terms = [sum(1 << at for at in term) for term in parts.terms]
    terms += [1 << size] * (size - len(terms))  # there is no such part
    flat = [own[at] for at in range(4) for own in columns] + terms
    return integers_to_device([flat], device)[0]


@functools.lru_cache(maxsize=256)
def _changes(parts: FewParts) -> int:
    """Keys, other than the first, at which parts that show a row one interval may begin or end."""
    singles = [own for own in parts.parts if not own.of_keys]
    return sum(0 if own.kind == Kind.QUERY_IN else 1 if own.kind == Kind.PREFIX else 2 for own in singles)


_NUMBERS = (
    *("stride_sequence", "stride_span", "stride_edge", "spans", "second", "third", "fourth", "key_spans", "terms"),
    *("steps", "total_q", "batch", "levels", "intervals"),
)
WINDOW, SPAN, PREFIX, QUERY_IN, KEY_IN, KEY_OUTSIDE = (tl.constexpr(int(kind)) for kind in Kind)


@triton.jit(do_not_specialize=_NUMBERS)
def composed_rows_kernel(
    lo,
    hi,
    fine,
    table,
    cu_seqlens_q,
    cu_seqlens_k,
    ranges,
    stride_sequence,
    stride_span,
    stride_edge,
    spans,
    second,
    third,
    fourth,
    key_spans,
    terms,
    steps,
    total_q,
    batch,
    levels,
    intervals,
    ROWS: tl.constexpr,
    CHECKED: tl.constexpr,
    SIZE: tl.constexpr,
    SPANS_AT_ONCE: tl.constexpr,
    END: tl.constexpr,
):
    """Program `b` writes the rows of block `b`.

    key_spans: those of sets of which all keys are looked at, which come first. steps: enough for a row to come to the
    end of the keys, and to `END - 1`, where no such span begins or ends.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < total_q
    sequence, _first_key, keys, position = row_place(cu_seqlens_q, cu_seqlens_k, row, batch, levels)
    own = ranges + sequence.to(tl.int64) * stride_sequence

    part = tl.arange(0, SIZE)
    kind = tl.load(table + part)[None, :]
    part_set = tl.load(table + SIZE + part)[None, :]
    left = tl.load(table + 2 * SIZE + part)[None, :]
    right = tl.load(table + 3 * SIZE + part)[None, :]
    term = tl.load(table + 4 * SIZE + tl.arange(0, SIZE))[None, :]

    # The last span of a part's set that begins at or before the row.
    at = position[:, None]
    start = tl.zeros([ROWS, SIZE], tl.int32) - 1
    stop = tl.zeros([ROWS, SIZE], tl.int32)
    for span in range(spans):
        own_start = tl.load(own + span * stride_span)[:, None]
        own_end = tl.load(own + span * stride_span + stride_edge)[:, None]
        later = (own_end > 0) & (own_start <= at) & (own_start > start)
        later &= set_of(span, second, third, fourth) == part_set
        start = tl.where(later, own_start, start)
        stop = tl.where(later, own_end, stop)

    # What parts show a row, those `of_keys` in their spans, or outside of them.
    shows = (at < stop) | ((kind != SPAN) & (kind != QUERY_IN))
    begin = tl.where(kind == SPAN, start, tl.maximum(at, 0)) - left
    begin = tl.where((kind == WINDOW) | (kind == SPAN), tl.maximum(begin, 0), 0)
    ahead = tl.minimum(at + 1, keys[:, None] - right) + right  # no wider than the keys, and no overflow
    end = tl.where((kind == SPAN) | (kind == PREFIX), stop, END)
    end = tl.where((kind == WINDOW) & (right < END), ahead, end)
    begin = tl.where(shows, begin, END)
    end = tl.where(shows, end, 0)

    # Where all terms begin and end; steps are taken between.
    first_seen = tl.zeros([ROWS], tl.int32) + END
    end_seen = tl.zeros([ROWS], tl.int32)
    for index in range(terms):
        is_part = (((tl.load(table + 4 * SIZE + index) >> part) & 1) > 0)[None, :]
        first_seen = tl.minimum(first_seen, tl.max(tl.where(is_part, begin, 0), axis=1))
        end_seen = tl.maximum(end_seen, tl.min(tl.where(is_part, end, END), axis=1))
    changes = tl.zeros([ROWS], tl.int32)
    for first in range(0, key_spans, SPANS_AT_ONCE):
        s, e, column = _spans(own, first, key_spans, stride_span, stride_edge, keys, SPANS_AT_ONCE)
        changes += tl.sum(((s > first_seen[:, None]) & (s < end_seen[:, None])).to(tl.int32), axis=1)
        changes += tl.sum(((e > first_seen[:, None]) & (e < end_seen[:, None])).to(tl.int32), axis=1)
    steps += tl.max(tl.where(inside, changes, 0), axis=0)

    key = tl.minimum(first_seen, keys)
    count = tl.zeros([ROWS], tl.int32)
    is_open = tl.zeros([ROWS], tl.int1)
    sees = tl.zeros([ROWS], tl.int1)
    sees_past = tl.zeros([ROWS], tl.int1)
    out = row.to(tl.int64) * intervals
    for _step in range(steps):
        held = tl.zeros([ROWS], tl.int32)  # spans of each set that hold the key, in eight bits
        following = keys
        for first in range(0, key_spans, SPANS_AT_ONCE):
            s, e, column = _spans(own, first, key_spans, stride_span, stride_edge, keys, SPANS_AT_ONCE)
            holds = (s <= key[:, None]) & (key[:, None] < e)
            one = 1 << (8 * set_of(column, second, third, fourth))[None, :]
            held += tl.sum(tl.where(holds, one, 0), axis=1)
            following = tl.minimum(following, _next_change(s, e, key, END))
        is_in = ((held[:, None] >> (8 * part_set)) & 255) > 0
        shown = (begin <= key[:, None]) & (key[:, None] < end)
        shown &= ((kind != KEY_IN) | is_in) & ((kind != KEY_OUTSIDE) | (is_in == 0))
        following = tl.minimum(following, _next_change(begin, end, key, END))
        by = tl.sum(tl.where(shown, (1 << part)[None, :], 0), axis=1)[:, None]
        sees = tl.max(((by & term) == term).to(tl.int32), axis=1) > 0

        sees_key = sees & (key < keys)
        tl.store(lo + out + count, key, mask=inside & sees_key & (is_open == 0) & (count < intervals))
        closes = is_open & (sees_key == 0)
        tl.store(hi + out + count, key, mask=inside & closes & (count < intervals))
        count += closes.to(tl.int32)
        is_open = sees_key
        sees_past = tl.where(key == keys, sees, sees_past)
        key = tl.where(key < keys, following, tl.maximum(keys, END - 1))

    for n in range(intervals):
        tl.store(lo + out + n, END, mask=inside & (count <= n))
        tl.store(hi + out + n, 0, mask=inside & (count <= n))
    if CHECKED:
        # What goes on past the keys goes on to `END`, unless it ends at the end of a span there.
        bad = inside & ((count > intervals) | (sees_past & (sees == 0)))
        tl.store(fine, False, mask=tl.max(bad.to(tl.int32), axis=0) > 0)


@triton.jit
def _spans(own, first, count, stride_span, stride_edge, keys, SPANS_AT_ONCE: tl.constexpr):
    """(start, end) of spans of each row's sequence from `first` on, cut where its keys end, and which they are.

    Those to come are not here yet: such a span begins after it ends.
    """
    column = first + tl.arange(0, SPANS_AT_ONCE)
    place = own[:, None] + (column.to(tl.int64) * stride_span)[None, :]
    s = tl.load(place, mask=(column < count)[None, :], other=0)
    e = tl.load(place + stride_edge, mask=(column < count)[None, :], other=0)
    return s, tl.minimum(e, keys[:, None]), column


@triton.jit
def _next_change(begin, end, key, END: tl.constexpr):
    """The first begin or end of a row's intervals that is past the row's key; `END` if none is."""
    ahead = tl.where(begin > key[:, None], begin, END)
    ahead = tl.minimum(ahead, tl.where(end > key[:, None], end, END))
    return tl.min(ahead, axis=1)


launch_composed_rows = Launcher(composed_rows_kernel)
