"""Row bounds and key tiles of a mask in closed form, from lengths and spans, in one launch.

The same as `geometry.intervals.row_bounds` and `geometry.tiles.tile_slots`, bit for bit. Nothing here synchronises on
a GPU. Two ways in, over one rule (`_fill_slot`):

- `plan_rows` makes the tensors of one plan, sized for its batch.
- `update_rows` fills a serving plan's buffers, which were allocated for the largest batch, and copies what of the batch
  the kernels read besides.

A query tile has its own slot whatever the lengths are, so the grid is known on the host: tile `m` of sequence `b`
has slot `cu_seqlens_q[b] // tile_tokens + b + m`. One program works on one slot.
"""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl

from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.ranges import Spans
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.geometry.tiles import power_of_two
from fa4_prefixlm.kernels.launch import Launcher
from fa4_prefixlm.kernels.span_sets import together
from fa4_prefixlm.masks.closed_form import ClosedForm
from fa4_prefixlm.masks.interval_lists import END_OF_KEYS

T = TypeVar("T")
SPANS_AT_ONCE = 32
PAGES_AT_ONCE = 256
FINE = (
    "cu_seqlens ascending from 0 within the rows of q and the plan's, seqlen_q <= seqlen_k within the plan's keys, and "
    "spans with 0 <= start < end, whole within the keys, that share no query token"
)
FINE_PLAN = (
    "cu_seqlens ascending from 0 to the tensor's length, seqlen_q <= seqlen_k, both within max_seqlen, and spans with "
    "0 <= start < end, whole within the keys and no longer than max_range, that share no query token"
)


def plan_rows(
    form: ClosedForm,
    lengths: Lengths,
    keys: Keys,
    spans: Sequence[Spans],
    tile_tokens: int,
    tile_n: int,
    *,
    padding: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(bounds, tiles)` of a batch whose tensors are on the device, int32.

    Values that the host does not know are checked by an assertion on the device, on the CPU (Triton's interpreter) by
    an `InputError`.

    Args:
        form: the mask.
        lengths: with bottom-right alignment, and keys from position 0.
        keys: where the keys are; in pages, their number is in `seqused_k`.
        spans: those of each set that the mask reads, in the order of the form.
        tile_tokens, tile_n: query tokens and keys of a tile.
        padding: rows of bounds after the last one, `(0, 0)`; a power of two.

    Returns:
        `(total_q + padding, 2)`, `[lo, hi)` of each row, local to its sequence's keys;
        `(slots, 4)`, the key tiles of each slot's query tile as `geometry.tiles.TileRuns` says them, 0 if it has none.
    """
    cu_seqlens_q, device = lengths.cu_seqlens_q, lengths.device
    counts = lengths.cu_seqlens_k if keys.seqused_k is None else keys.seqused_k
    ranges, (_, first_other, *_) = together([own.values for own in spans] or [None])
    slots = lengths.total_q // tile_tokens + lengths.batch + 1
    checked = not lengths.known or any(own.host is None for own in spans)
    longest = [END_OF_KEYS if own.host is not None else own.longest for own in spans]
    bounds = torch.empty(lengths.total_q + padding, 2, dtype=torch.int32, device=device)
    tiles = torch.empty(slots, 4, dtype=torch.int32, device=device)
    fine = torch.ones(1, dtype=torch.bool, device=device) if checked else bounds
    with torch.cuda.device_of(bounds):
        launch_plan_rows(
            slots,
            (bounds, tiles, fine, cu_seqlens_q, counts, cu_seqlens_q if ranges is None else ranges),
            (
                *((0, 0, 0) if ranges is None else ranges.stride()),
                0 if ranges is None else ranges.shape[1],
                first_other,
                lengths.batch,
                lengths.batch.bit_length(),
                lengths.total_q,
                lengths.total_k,
                lengths.max_seqlen_q,
                min(lengths.max_seqlen_k, END_OF_KEYS),
                *_both(longest, END_OF_KEYS),
                *_windows(form),
            ),
            {
                "PADDING": padding,
                "CHECKED": checked,
                "CUMULATIVE": keys.seqused_k is None,
                **constants(form, tile_tokens, tile_n),
            },
        )
        if checked:
            _require(fine, FINE_PLAN)
    return bounds, tiles


@dataclass(frozen=True)
class RowBuffers:
    """What kernels read of a serving plan; int32 on the device except `fine`.

    Attributes:
        bounds: `(max_tokens + padding, 2)`, `[lo, hi)` of each query row, local to its sequence's keys. Rows past the
            batch hold those of an earlier one, or (0, 0).
        tiles: `(slots, 4)`, first, full_first, full_end and end of each query tile, as in `geometry.tiles.TileRuns`.
            Unused slots are 0.
        cu_seqlens_q: `(max_sequences + 1,)`, the batch's own, its last value repeated.
        seqused_k: `(max_sequences,)`, keys of each sequence, 0 for unused ones.
        page_table: `(max_sequences, max_pages)`, the batch's own. Entries that the batch does not have are those of
            earlier ones.
        fine: `(1,)` bool, False once a program saw values that are not valid.
        max_tokens: query tokens of a batch, at most.
        max_sequences: sequences of a batch, at most.
        tile_tokens: query tokens of a tile.
        tile_n: keys of a tile.
    """

    bounds: torch.Tensor
    tiles: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    page_table: torch.Tensor
    fine: torch.Tensor
    max_tokens: int
    max_sequences: int
    tile_tokens: int
    tile_n: int

    @classmethod
    def allocate(
        cls,
        max_tokens: int,
        max_sequences: int,
        tile_tokens: int,
        tile_n: int,
        max_pages: int,
        device: torch.device | str,
        padding: int = 256,
    ) -> RowBuffers:
        """Empty buffers. padding: rows of `bounds` that kernels may read past the last one, up to a tile."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        slots = max_tokens // tile_tokens + max_sequences + 1
        return cls(
            bounds=zeros(max_tokens + padding, 2),
            tiles=zeros(slots, 4),
            cu_seqlens_q=zeros(max_sequences + 1),
            seqused_k=zeros(max_sequences),
            page_table=zeros(max_sequences, max_pages),
            fine=torch.ones(1, dtype=torch.bool, device=device),
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            tile_tokens=tile_tokens,
            tile_n=tile_n,
        )


def update_rows(
    form: ClosedForm,
    buffers: RowBuffers,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    ranges: Sequence[torch.Tensor | None] = (),
    *,
    page_table: torch.Tensor | None = None,
    max_rows: int | None = None,
    max_keys: int | None = None,
) -> None:
    """Fill `buffers` for a batch of at most `max_sequences` sequences and `max_tokens` query tokens.

    Values are checked by an assertion on the device.

    Args:
        form: the mask.
        buffers: written in place.
        cu_seqlens_q: `(batch + 1,)` int32 on the device.
        seqused_k: `(batch,)` int32 on the device, keys of each sequence.
        ranges: for each set that the mask reads, in the order of the form, None if there are no spans, or
            `(batch, max_ranges, 2)` int32 on the device with any strides, half-open `[start, end)` in absolute key
            positions, in any order, unused rows `(0, 0)`. A span that starts at or after `seqlen_k` belongs to a later
            chunk and is ignored; any other ends at or before it, if rows see ahead in a span.
        page_table: `(batch, pages)` int32 on the device, at most as wide as the buffer; copied to it.
        max_rows: query rows of the batch, at most, where that is below the plan's `max_tokens`.
        max_keys: keys of a sequence, at most.

    Raises:
        InputError: a tensor has the wrong shape, dtype or device, or, on the CPU (Triton's interpreter), bad values.
    """
    batch = cu_seqlens_q.shape[0] - 1
    if not 0 <= batch <= buffers.max_sequences:
        raise InputError("cu_seqlens_q", f"at most the plan's {buffers.max_sequences} sequences", batch)
    _check("cu_seqlens_q", cu_seqlens_q, (batch + 1,), buffers)
    _check("seqused_k", seqused_k, (batch,), buffers)
    if len(ranges) > len(form.inside):
        raise InputError("ranges", f"those of {len(form.inside)} sets, which the mask reads", len(ranges))
    for own in ranges:
        if own is not None:
            _check("ranges", own, (batch, own.shape[1] if own.ndim == 3 else 0, 2), buffers)
    spans, (_, first_other, *_) = together(ranges or [None])
    table = cu_seqlens_q if page_table is None else page_table.contiguous()
    width = 0 if page_table is None else page_table.shape[1]
    if page_table is not None:
        _check("page_table", page_table, (batch, min(width, buffers.page_table.shape[1])), buffers)
    with torch.cuda.device_of(buffers.fine):
        launch_update_rows(
            buffers.tiles.shape[0],
            (
                buffers.bounds,
                buffers.tiles,
                buffers.cu_seqlens_q,
                buffers.seqused_k,
                buffers.page_table,
                buffers.fine,
                cu_seqlens_q.contiguous(),
                seqused_k.contiguous(),
                table,
                cu_seqlens_q if spans is None else spans,
            ),
            (
                *((0, 0, 0) if spans is None else spans.stride()),
                0 if spans is None else spans.shape[1],
                first_other,
                batch,
                buffers.max_sequences.bit_length(),
                width,
                buffers.page_table.shape[1],
                buffers.max_tokens if max_rows is None else min(max_rows, buffers.max_tokens),
                buffers.max_sequences,
                END_OF_KEYS if max_keys is None else min(max_keys, END_OF_KEYS),
                *_windows(form),
            ),
            {**constants(form, buffers.tile_tokens, buffers.tile_n), "PAGES_AT_ONCE": PAGES_AT_ONCE},
        )
        _require(buffers.fine, FINE)


@functools.cache
def constants(form: ClosedForm, tile_tokens: int, tile_n: int) -> dict[str, object]:
    """What both kernels are compiled for."""
    inside, other = _both([own.edges for own in form.inside], form.outside)
    return {
        "OUTSIDE_BEGIN": form.outside.begin,
        "OUTSIDE_END": form.outside.end,
        "INSIDE_BEGIN": inside.begin,
        "INSIDE_END": inside.end,
        "WHOLE_SPANS": inside.end != "row",
        "TWO_SETS": len(form.inside) > 1,
        "OTHER_BEGIN": other.begin,
        "OTHER_END": other.end,
        "WHOLE_OTHERS": other.end != "row",
        "TILE_TOKENS": tile_tokens,
        "TILE_N": tile_n,
        "ROWS": power_of_two(tile_tokens),
        "SPANS_AT_ONCE": SPANS_AT_ONCE,
    }


def _windows(form: ClosedForm) -> tuple[int, int, int, int]:
    """The windows on the left and on the right, and what the spans of each set are moved by.

    A form that has no such window does not read it.
    """
    befores = [min(own.before, END_OF_KEYS) for own in form.inside]
    return min(form.window or 1, END_OF_KEYS), min(form.right or 0, END_OF_KEYS), *_both(befores, 0)


def _both(values: Sequence[T], missing: T) -> tuple[T, T]:
    """The values of the two sets."""
    first, other, *_ = [*values, missing, missing]
    return first, other


def _require(fine: torch.Tensor, expected: str) -> None:
    if fine.is_cuda:
        torch._assert_async(fine, f"expected {expected}")
    elif not fine:
        fine.fill_(True)
        raise InputError("cu_seqlens_q, cu_seqlens_k, seqused_k, ranges", expected, "other values")


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], buffers: RowBuffers) -> None:
    if tensor.dtype != torch.int32:
        raise InputError(name, "dtype torch.int32", tensor.dtype)
    if tensor.shape != shape:
        raise InputError(name, f"shape {shape}", tuple(tensor.shape))
    if tensor.device != buffers.fine.device:
        raise InputError(name, f"a tensor on the plan's device {buffers.fine.device}", tensor.device)


BATCH_VALUES = (
    *("stride_sequence", "stride_span", "stride_edge", "spans", "first_other", "batch", "levels", "pages", "max_pages"),
    "max_rows",
    *("max_sequences", "max_keys", "window", "right", "total_q", "total_k", "max_seqlen_q", "max_seqlen_k"),
    *("longest_span", "longest_other", "before", "before_other"),
)


@triton.jit(do_not_specialize=BATCH_VALUES)
def plan_rows_kernel(
    bounds,
    tiles,
    fine,
    cu_seqlens_q,
    counts,
    ranges,
    stride_sequence,
    stride_span,
    stride_edge,
    spans,
    first_other,
    batch,
    levels,
    total_q,
    total_k,
    max_seqlen_q,
    max_seqlen_k,
    longest_span,
    longest_other,
    window,
    right,
    before,
    before_other,
    PADDING: tl.constexpr,
    CHECKED: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    OUTSIDE_BEGIN: tl.constexpr,
    OUTSIDE_END: tl.constexpr,
    INSIDE_BEGIN: tl.constexpr,
    INSIDE_END: tl.constexpr,
    WHOLE_SPANS: tl.constexpr,
    TWO_SETS: tl.constexpr,
    OTHER_BEGIN: tl.constexpr,
    OTHER_END: tl.constexpr,
    WHOLE_OTHERS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_N: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS_AT_ONCE: tl.constexpr,
):
    """Program `slot` writes the query tile of that slot, and checks the lengths of sequence `slot`.

    The first one writes the padding of bounds too.

    counts: `cu_seqlens_k` (CUMULATIVE) or `seqused_k`.
    """
    slot = tl.program_id(0)
    if slot == 0:
        tl.store(bounds + total_q * 2 + tl.arange(0, 2 * PADDING), 0)
    good = _fill_slot(
        slot,
        bounds,
        tiles,
        cu_seqlens_q,
        counts,
        ranges,
        stride_sequence,
        stride_span,
        stride_edge,
        spans,
        first_other,
        batch,
        levels,
        total_q,
        max_seqlen_k,
        longest_span,
        longest_other,
        window,
        right,
        before,
        before_other,
        CUMULATIVE,
        OUTSIDE_BEGIN,
        OUTSIDE_END,
        INSIDE_BEGIN,
        INSIDE_END,
        WHOLE_SPANS,
        TWO_SETS,
        OTHER_BEGIN,
        OTHER_END,
        WHOLE_OTHERS,
        TILE_TOKENS,
        TILE_N,
        ROWS,
        SPANS_AT_ONCE,
    )
    if CHECKED:
        good &= _lengths_are_good(slot, cu_seqlens_q, counts, batch, total_q, max_seqlen_k, CUMULATIVE)
        begin, end = _pair(cu_seqlens_q, slot, batch)
        good &= (end - begin <= max_seqlen_q) & ((slot != batch) | (begin == total_q))
        if CUMULATIVE:
            first_key, _ = _pair(counts, slot, batch)
            good &= ((slot > 0) | (first_key == 0)) & ((slot != batch) | (first_key == total_k))
        tl.store(fine, False, mask=good == 0)


@triton.jit(do_not_specialize=BATCH_VALUES)
def update_rows_kernel(
    bounds,
    tiles,
    own_cu_seqlens_q,
    own_seqused_k,
    own_page_table,
    fine,
    cu_seqlens_q,
    seqused_k,
    page_table,
    ranges,
    stride_sequence,
    stride_span,
    stride_edge,
    spans,
    first_other,
    batch,
    levels,
    pages,
    max_pages,
    max_rows,
    max_sequences,
    max_keys,
    window,
    right,
    before,
    before_other,
    OUTSIDE_BEGIN: tl.constexpr,
    OUTSIDE_END: tl.constexpr,
    INSIDE_BEGIN: tl.constexpr,
    INSIDE_END: tl.constexpr,
    WHOLE_SPANS: tl.constexpr,
    TWO_SETS: tl.constexpr,
    OTHER_BEGIN: tl.constexpr,
    OTHER_END: tl.constexpr,
    WHOLE_OTHERS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_N: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS_AT_ONCE: tl.constexpr,
    PAGES_AT_ONCE: tl.constexpr,
):
    """Program `slot` writes the query tile of that slot, copies and checks the lengths of sequence `slot`, and copies
    its pages.
    """
    slot = tl.program_id(0)
    begin, _ = _pair(cu_seqlens_q, slot, batch)
    seqlen_k, _ = _seqlen_k(seqused_k, slot, batch, max_keys, False)
    tl.store(own_cu_seqlens_q + slot, tl.minimum(tl.maximum(begin, 0), max_rows), mask=slot <= max_sequences)
    tl.store(own_seqused_k + slot, seqlen_k, mask=slot < max_sequences)

    for first in range(0, tl.where(slot < batch, pages, 0), PAGES_AT_ONCE):
        column = first + tl.arange(0, PAGES_AT_ONCE)
        entry = tl.load(page_table + slot.to(tl.int64) * pages + column, mask=column < pages, other=0)
        tl.store(own_page_table + slot.to(tl.int64) * max_pages + column, entry, mask=column < pages)

    good = _lengths_are_good(slot, cu_seqlens_q, seqused_k, batch, max_rows, max_keys, False)
    good &= _fill_slot(
        slot,
        bounds,
        tiles,
        cu_seqlens_q,
        seqused_k,
        ranges,
        stride_sequence,
        stride_span,
        stride_edge,
        spans,
        first_other,
        batch,
        levels,
        max_rows,
        max_keys,
        max_keys,  # no span is too long
        max_keys,
        window,
        right,
        before,
        before_other,
        False,
        OUTSIDE_BEGIN,
        OUTSIDE_END,
        INSIDE_BEGIN,
        INSIDE_END,
        WHOLE_SPANS,
        TWO_SETS,
        OTHER_BEGIN,
        OTHER_END,
        WHOLE_OTHERS,
        TILE_TOKENS,
        TILE_N,
        ROWS,
        SPANS_AT_ONCE,
    )
    tl.store(fine, False, mask=good == 0)


launch_plan_rows = Launcher(plan_rows_kernel)
launch_update_rows = Launcher(update_rows_kernel)


@triton.jit
def _fill_slot(
    slot,
    bounds,
    tiles,
    cu_seqlens_q,
    counts,
    ranges,
    stride_sequence,
    stride_span,
    stride_edge,
    spans,
    first_other,
    batch,
    levels,
    max_rows,
    max_keys,
    longest_span,
    longest_other,
    window,
    right,
    before,
    before_other,
    CUMULATIVE: tl.constexpr,
    OUTSIDE_BEGIN: tl.constexpr,
    OUTSIDE_END: tl.constexpr,
    INSIDE_BEGIN: tl.constexpr,
    INSIDE_END: tl.constexpr,
    WHOLE_SPANS: tl.constexpr,
    TWO_SETS: tl.constexpr,
    OTHER_BEGIN: tl.constexpr,
    OTHER_END: tl.constexpr,
    WHOLE_OTHERS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_N: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS_AT_ONCE: tl.constexpr,
):
    """Write the bounds of the query tile of `slot` and its key tiles. Returns whether the spans it saw are good.

    Values are clamped wherever an address or a bound comes from them, so that bad ones do no harm.
    A span that starts at or after the last key is not here yet, and is passed over.
    """
    # The slots where sequences begin ascend: the tile's sequence is the last one that begins at or before `slot`.
    sequence = 0
    for level in range(levels):
        later = sequence + (1 << (levels - 1 - level))
        first_slot = tl.load(cu_seqlens_q + tl.minimum(later, batch)) // TILE_TOKENS + later
        sequence = tl.where((later < batch) & (first_slot <= slot), later, sequence)
    begin, end = _pair(cu_seqlens_q, sequence, batch)
    begin, end = tl.maximum(begin, 0), tl.minimum(end, max_rows)
    seqlen_k, _ = _seqlen_k(counts, sequence, batch, max_keys, CUMULATIVE)
    tile = slot - (begin // TILE_TOKENS + sequence)
    first_row = begin + tile * TILE_TOKENS
    is_tile = (tile >= 0) & (first_row < end)
    token = tl.arange(0, ROWS)
    row = first_row + token
    inside = (token < TILE_TOKENS) & (row >= begin) & (row < end)
    position = row - end + seqlen_k

    start = tl.zeros([ROWS], tl.int32)
    stop = tl.zeros([ROWS], tl.int32)
    holding = tl.zeros([ROWS], tl.int32)
    other_start = tl.zeros([ROWS], tl.int32)
    other_stop = tl.zeros([ROWS], tl.int32)
    other_holding = tl.zeros([ROWS], tl.int32)
    wrong = tl.zeros([SPANS_AT_ONCE], tl.int1)
    ranges += tl.cast(sequence, tl.int64) * stride_sequence
    for first in range(0, tl.where(is_tile, spans, 0), SPANS_AT_ONCE):
        index = first + tl.arange(0, SPANS_AT_ONCE)
        at = ranges + index.to(tl.int64) * stride_span
        s = tl.load(at, mask=index < spans, other=0)
        e = tl.load(at + stride_edge, mask=index < spans, other=0)
        used = (s != 0) | (e != 0)
        longest = longest_span
        whole = tl.zeros_like(used) | WHOLE_SPANS
        holds = (s[:, None] <= position[None, :]) & (position[None, :] < e[:, None])
        if TWO_SETS:
            is_other = index >= first_other
            longest = tl.where(is_other, longest_other, longest_span)
            whole = tl.where(is_other, WHOLE_OTHERS, WHOLE_SPANS)
            others = holds & is_other[:, None]
            holds &= is_other[:, None] == 0
            other_start, other_stop, other_holding = _take(others, s, e, other_start, other_stop, other_holding)
        start, stop, holding = _take(holds, s, e, start, stop, holding)
        wrong |= used & ((s < 0) | (s >= e) | ((s < seqlen_k) & (tl.minimum(e, seqlen_k) - s > longest)))
        wrong |= used & whole & (s < seqlen_k) & (e > seqlen_k)
    good = tl.max(wrong.to(tl.int32), axis=0) == 0
    good &= tl.max(tl.where(inside, tl.maximum(holding, other_holding), 0), axis=0) <= 1

    left = tl.maximum(position - (window - 1), 0)
    ahead = tl.minimum(position + 1, seqlen_k - right) + right  # no wider than the keys, and no overflow
    lo, hi = _edges(OUTSIDE_BEGIN, OUTSIDE_END, position, left, ahead, start, stop, seqlen_k)
    start = tl.maximum(start - before, 0)
    lo_inside, hi_inside = _edges(INSIDE_BEGIN, INSIDE_END, position, left, ahead, start, stop, seqlen_k)
    lo, hi = tl.where(holding > 0, lo_inside, lo), tl.where(holding > 0, hi_inside, hi)
    if TWO_SETS:  # a row in spans of both sees the union
        start = tl.maximum(other_start - before_other, 0)
        lo_other, hi_other = _edges(OTHER_BEGIN, OTHER_END, position, left, ahead, start, other_stop, seqlen_k)
        lo = tl.where(other_holding > 0, tl.minimum(lo, lo_other), lo)
        hi = tl.where(other_holding > 0, tl.maximum(hi, hi_other), hi)
    lo = tl.minimum(lo, seqlen_k)
    hi = tl.maximum(tl.minimum(hi, seqlen_k), 0)
    tl.store(bounds + row * 2, lo, mask=inside)
    tl.store(bounds + row * 2 + 1, hi, mask=inside)

    # As in geometry.tiles.tile_runs; every row of a valid batch sees some key.
    first = tl.min(tl.where(inside, lo, seqlen_k), axis=0) // TILE_N
    last = (tl.max(tl.where(inside, hi, 0), axis=0) + TILE_N - 1) // TILE_N
    full_first = (tl.max(tl.where(inside, lo, 0), axis=0) + TILE_N - 1) // TILE_N
    full_end = tl.min(tl.where(inside, hi, seqlen_k), axis=0) // TILE_N
    first, full_first, full_end = tl.minimum(first, last), tl.minimum(full_first, last), tl.minimum(full_end, last)
    any_full = full_first < full_end
    tl.store(tiles + slot * 4, first)
    tl.store(tiles + slot * 4 + 1, tl.where(any_full, full_first, first))
    tl.store(tiles + slot * 4 + 2, tl.where(any_full, full_end, first))
    tl.store(tiles + slot * 4 + 3, last)
    return good


@triton.jit
def _take(holds, s, e, start, stop, holding):
    """The spans `[s, e)` beside those of before: which holds each row, and how many do."""
    start = tl.maximum(start, tl.max(tl.where(holds, s[:, None], 0), axis=0))
    stop = tl.maximum(stop, tl.max(tl.where(holds, e[:, None], 0), axis=0))
    return start, stop, holding + tl.sum(holds.to(tl.int32), axis=0)


@triton.jit
def _lengths_are_good(slot, cu_seqlens_q, counts, batch, max_rows, max_keys, CUMULATIVE: tl.constexpr):
    """The lengths of sequence `slot` are those of a sequence within `max_rows` rows and `max_keys` keys."""
    begin, end = _pair(cu_seqlens_q, slot, batch)
    seqlen_k, good = _seqlen_k(counts, slot, batch, max_keys, CUMULATIVE)
    good &= (begin >= 0) & (begin <= end) & (end <= max_rows) & ((slot > 0) | (begin == 0))
    return good & (end - begin <= seqlen_k)


@triton.jit
def _pair(cumulative, index, batch):
    """Entries `index` and `index + 1`; the last one past the end."""
    return tl.load(cumulative + tl.minimum(index, batch)), tl.load(cumulative + tl.minimum(index + 1, batch))


@triton.jit
def _seqlen_k(counts, sequence, batch, max_keys, CUMULATIVE: tl.constexpr):
    """(keys of the sequence, clamped; whether the value is fine). counts: `cu_seqlens_k` or `seqused_k`."""
    if CUMULATIVE:
        begin, end = _pair(counts, sequence, batch)
        count = end - begin
    else:
        count = tl.load(counts + sequence, mask=sequence < batch, other=0)
    return tl.minimum(tl.maximum(count, 0), max_keys), (count >= 0) & (count <= max_keys)


@triton.jit
def _edges(BEGIN: tl.constexpr, END: tl.constexpr, position, left, ahead, start, stop, seqlen_k):
    """`[lo, hi)` of the rows, by the names of `closed_form.Edges`."""
    lo = tl.zeros_like(position)
    if BEGIN == "window":
        lo = left
    elif BEGIN == "window or span":
        lo = tl.minimum(left, start)
    hi = position + 1
    if END == "window":
        hi = ahead
    elif END == "span":
        hi = stop
    elif END == "window and span":
        hi = tl.minimum(ahead, stop)
    elif END == "window or span":
        hi = tl.maximum(ahead, stop)
    elif END == "keys":
        hi = tl.zeros_like(position) + seqlen_k
    return lo, hi
