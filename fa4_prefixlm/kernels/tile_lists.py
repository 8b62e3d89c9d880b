"""The key tiles of each query tile, listed in one launch for masks of any intervals, and what `flex` reads besides.

The same numbers as `geometry.tiles.tile_map` and the lists made of it take some hundred launches for, each a few
microseconds of the host's time. Nothing synchronises.

A kernel counts, for every pair of a query tile and a key tile, the rows whose intervals touch it and those whose
intervals fill it. Two ways to cut the batch into tiles: each sequence by itself (`varlen_tile_lists`), or the batch as
one sequence, with the keys of each sequence where they are in the packed keys (`packed_tile_lists`, `block_tables`).
"""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fa4_prefixlm.batch.lengths import Lengths, cumulative
from fa4_prefixlm.device_checks import integers_to_device
from fa4_prefixlm.geometry.block_lists import BlockLists, countable_entries
from fa4_prefixlm.geometry.tiles import ceil_div, count_query_tiles, power_of_two
from fa4_prefixlm.kernels.launch import Launcher
from fa4_prefixlm.kernels.search import last_begin
from fa4_prefixlm.masks.interval_lists import EMPTY_LO

# Key tiles that a program looks at together.
COLUMNS = 32

Pair = tuple[torch.Tensor, torch.Tensor]


class BlockTables(NamedTuple):
    """Of a batch as one sequence of `rows` blocks of queries and `keys` blocks of keys; on the device.

    Attributes:
        ends: `(2 * intervals, rows, block)` int32, of each interval in turn where it begins in the packed keys and its
            width, both with the sign bit flipped.
        counts, indices: of the partial blocks of keys, `(1, 1, rows)` and `(1, 1, rows, keys)` int32, ascending; 0 past
            the count.
        full_counts, full_indices: of those that all rows see whole.
        is_full, is_partial: `(rows, keys)` bool, the same as a map.
    """

    ends: torch.Tensor
    counts: torch.Tensor
    indices: torch.Tensor
    full_counts: torch.Tensor
    full_indices: torch.Tensor
    is_full: torch.Tensor
    is_partial: torch.Tensor


def block_tables(
    lo: torch.Tensor,
    hi: torch.Tensor,
    lengths: Lengths,
    *,
    rows: int,
    keys: int,
    block: int,
    intervals: int,
    tagged: Pair | None = None,
) -> BlockTables:
    """The tables of a batch.

    Args:
        lo, hi: `(>= total_q, K)` int32 on the device, of the same strides: `[lo, hi)` of each row, local to its
            sequence's keys, disjoint; `lo >= hi` is an empty one.
        lengths: of the sequences.
        rows, keys: blocks of queries and of keys, enough for the batch; rows past it see nothing.
        block: tokens of a block.
        intervals: of the ends, at least K; those past K are empty. 0: no ends are made.
        tagged: the tags of rows and of keys by block, `geometry.packed_row_tiles.tag_ranges`.
    """
    made = BlockTables(
        ends=_empty(lo, 2 * intervals, rows, block),
        counts=_empty(lo, 1, 1, rows),
        indices=_empty(lo, 1, 1, rows, keys),
        full_counts=_empty(lo, 1, 1, rows),
        full_indices=_empty(lo, 1, 1, rows, keys),
        is_full=torch.empty(rows, keys, dtype=torch.bool, device=lo.device),
        is_partial=torch.empty(rows, keys, dtype=torch.bool, device=lo.device),
    )
    _launch(lo, hi, lengths, made, tiles=rows, tile=(block, block), columns=keys, tagged=tagged, padded=rows * block)
    return made


def packed_tile_lists(lo: torch.Tensor, hi: torch.Tensor, lengths: Lengths, tile_m: int, tile_n: int) -> BlockLists:
    """The block lists of a batch as one sequence, as many columns as there are key tiles.

    lo, hi: as for `block_tables`.
    """
    tiles, columns = ceil_div(lengths.total_q, tile_m), max(1, ceil_div(lengths.total_k, tile_n))
    made = BlockTables(
        ends=_empty(lo, 0),
        counts=_empty(lo, 1, 1, tiles),
        indices=_empty(lo, 1, 1, tiles, columns),
        full_counts=_empty(lo, 1, 1, tiles),
        full_indices=_empty(lo, 1, 1, tiles, columns),
        is_full=_empty(lo, 0),
        is_partial=_empty(lo, 0),
    )
    _launch(lo, hi, lengths, made, tiles=tiles, tile=(tile_m, tile_n), columns=columns)
    return BlockLists(*made[1:5], None, None, (tile_m, tile_n))


def varlen_tile_lists(lo: torch.Tensor, hi: torch.Tensor, lengths: Lengths, tile_m: int, tile_n: int) -> BlockLists:
    """The block lists of a batch in FA4's varlen layout, see `geometry.block_lists.varlen_lists`.

    lo, hi: as for `block_tables`.

    Raises:
        InputError: more entries than kernels count.
    """
    entries, tiles = countable_entries(lengths, tile_m, tile_n), count_query_tiles(lengths, tile_m)
    cu_tiles, cu_entries = _begins(lengths, tile_m, tile_n)
    made = BlockTables(
        ends=_empty(lo, 0),
        counts=_empty(lo, 1, tiles),
        indices=_empty(lo, 1, entries),
        full_counts=_empty(lo, 1, tiles),
        full_indices=_empty(lo, 1, entries),
        is_full=_empty(lo, 0),
        is_partial=_empty(lo, 0),
    )
    columns = max(1, ceil_div(lengths.max_seqlen_k, tile_n))
    by = (cu_tiles, cu_entries)
    _launch(lo, hi, lengths, made, tiles=tiles, tile=(tile_m, tile_n), columns=columns, by_sequence=by)
    return BlockLists(*made[1:5], cu_tiles, cu_entries, (tile_m, tile_n))


def _begins(lengths: Lengths, tile_m: int, tile_n: int) -> Pair:
    """`(batch + 1,)` int32 on the device each: where the query tiles of each sequence begin, and its entries."""
    if lengths.seqlens_q is not None and lengths.seqlens_k is not None:
        tiles = [ceil_div(count, tile_m) for count in lengths.seqlens_q]
        entries = [own * ceil_div(count, tile_n) for own, count in zip(tiles, lengths.seqlens_k, strict=True)]
        cu_tiles, cu_entries = integers_to_device([cumulative(tiles), cumulative(entries)], lengths.device)
        return cu_tiles, cu_entries
    rows = (lengths.cu_seqlens_q.diff() + (tile_m - 1)) // tile_m
    keys = (lengths.cu_seqlens_k.diff() + (tile_n - 1)) // tile_n
    cu_tiles, cu_entries = (
        torch.nn.functional.pad(own.cumsum(0, dtype=torch.int32), (1, 0)) for own in (rows, rows * keys)
    )
    return cu_tiles, cu_entries


def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device=like.device)


def _launch(
    lo: torch.Tensor,
    hi: torch.Tensor,
    lengths: Lengths,
    made: BlockTables,
    *,
    tiles: int,
    tile: tuple[int, int],
    columns: int,
    tagged: Pair | None = None,
    by_sequence: Pair | None = None,
    padded: int | None = None,
) -> None:
    """Fill `made`.

    Args:
        tiles: of queries.
        tile: query tokens and keys of a tile.
        columns: key tiles of the batch, or, with `by_sequence`, of the longest sequence.
        by_sequence: `(cu_tiles, cu_entries)`, where the tiles and the entries of each sequence begin.
        padded: query tokens, those of no sequence included, which see nothing; None: total_q.
    """
    total_q, batch = lengths.total_q, lengths.batch
    # `hi` may be a view into the memory of `lo`, which its own address is not aligned in.
    shared = hi.untyped_storage().data_ptr() == lo.untyped_storage().data_ptr()
    cu_q, cu_k = lengths.cu_seqlens_q, lengths.cu_seqlens_k
    with torch.cuda.device_of(lo):
        launch_tile_lists(
            tiles,
            (lo, lo if shared else hi, cu_q, cu_k, *(by_sequence or (cu_q, cu_q)), *(tagged or (cu_q, cu_q)), *made),
            (
                *lo.stride(),
                int(hi.storage_offset() - lo.storage_offset()) if shared else 0,
                total_q,
                total_q if padded is None else padded,
                batch,
                batch.bit_length(),
                lo.shape[1],
                made.ends.shape[0] // 2,
                columns,
            ),
            {
                "BY_SEQUENCE": by_sequence is not None,
                "TAGGED": tagged is not None,
                "MAPPED": made.is_full.ndim == 2,
                "EMPTY": EMPTY_LO,
                "TILE_M": tile[0],
                "TILE_N": tile[1],
                "ROWS": power_of_two(tile[0]),
                "COLUMNS": COLUMNS,
            },
        )


_NUMBERS = (
    *("stride_row", "stride_interval", "hi_offset", "total_q", "padded_q", "batch", "levels", "given", "intervals"),
    "columns",
)


@triton.jit(do_not_specialize=_NUMBERS)
def tile_lists_kernel(
    lo,
    hi,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_tiles,
    cu_entries,
    row_tags,
    key_tags,
    ends,
    counts,
    indices,
    full_counts,
    full_indices,
    is_full,
    is_partial,
    stride_row,
    stride_interval,
    hi_offset,
    total_q,
    padded_q,
    batch,
    levels,
    given,
    intervals,
    columns,
    BY_SEQUENCE: tl.constexpr,
    TAGGED: tl.constexpr,
    MAPPED: tl.constexpr,
    EMPTY: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program `t` writes what query tile `t` reads."""
    tile = tl.program_id(0)
    token = tl.arange(0, ROWS)
    first_in_map = tile.to(tl.int64) * columns
    if BY_SEQUENCE:
        sequence = last_begin(cu_tiles, tile, batch, batch, levels)
        local = tile - tl.load(cu_tiles + sequence)
        first_row = tl.load(cu_seqlens_q + sequence) + local * TILE_M
        end_row = tl.minimum(tl.load(cu_seqlens_q + sequence + 1), total_q)
        key_tiles = tl.load(cu_seqlens_k + sequence + 1) - tl.load(cu_seqlens_k + sequence)
        key_tiles = tl.minimum((key_tiles + TILE_N - 1) // TILE_N, columns)
        first_entry = tl.load(cu_entries + sequence) + local.to(tl.int64) * key_tiles
        key_tiles = tl.where(first_row < end_row, key_tiles, 0)  # tiles past the batch
        row = first_row + token
        offset = tl.zeros([ROWS], tl.int32)
    else:
        first_row = tile * TILE_M
        end_row = padded_q
        key_tiles = columns
        first_entry = first_in_map
        row = first_row + token
        offset = tl.load(cu_seqlens_k + last_begin(cu_seqlens_q, row, batch, batch, levels))
    inside = (token < TILE_M) & (row < end_row) & (row < total_q)
    wanted = tl.minimum(end_row - first_row, TILE_M)
    first_of_row = row.to(tl.int64) * stride_row

    for n in range(intervals):
        is_given = tl.zeros_like(row) + n < given
        at = first_of_row + n * stride_interval
        low, width = _interval(lo, hi + hi_offset, at, inside & is_given, offset, EMPTY)
        low = tl.where(is_given, low, 0)
        place = ends + tl.cast(2 * n, tl.int64) * padded_q + row
        tl.store(place, low ^ -2147483648, mask=token < TILE_M)
        tl.store(place + padded_q, width ^ -2147483648, mask=token < TILE_M)

    if TAGGED:
        first_row_tag, last_row_tag, rows_tagged = _tag_range(row_tags, tile, True)
    partial_count = 0
    full_count = 0
    for first in range(0, key_tiles, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        exists = column < key_tiles
        begin = (column * TILE_N)[None, :]
        touched = tl.zeros([COLUMNS], tl.int32)
        filled = tl.zeros([COLUMNS], tl.int32)
        for n in range(given):
            low, width = _interval(lo, hi + hi_offset, first_of_row + n * stride_interval, inside, offset, EMPTY)
            high = tl.where(width > 0, low + width, 0)[:, None]
            low = low[:, None]
            touched |= tl.max(((low < begin + TILE_N) & (high > begin)).to(tl.int32), axis=0)
            filled += tl.sum(((low <= begin) & (high >= begin + TILE_N)).to(tl.int32), axis=0)
        whole = exists & (filled == wanted)
        partly = exists & (touched > 0)
        if TAGGED:
            first_tag, last_tag, tagged = _tag_range(key_tags, column, exists)
            whole |= (first_row_tag == last_tag) & (last_row_tag == first_tag) & ((rows_tagged & tagged) > 0)
            partly |= exists & (first_row_tag <= last_tag) & (first_tag <= last_row_tag)
        partly &= whole == 0
        if MAPPED:
            tl.store(is_full + first_in_map + column, whole, mask=exists)
            tl.store(is_partial + first_in_map + column, partly, mask=exists)
        place = partial_count + tl.cumsum(partly.to(tl.int32), axis=0) - 1
        tl.store(indices + first_entry + place, column, mask=partly)
        place = full_count + tl.cumsum(whole.to(tl.int32), axis=0) - 1
        tl.store(full_indices + first_entry + place, column, mask=whole)
        partial_count += tl.sum(partly.to(tl.int32), axis=0)
        full_count += tl.sum(whole.to(tl.int32), axis=0)
    tl.store(counts + tile, partial_count)
    tl.store(full_counts + tile, full_count)
    for first in range(0, key_tiles, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        exists = column < key_tiles
        tl.store(indices + first_entry + column, 0, mask=exists & (column >= partial_count))
        tl.store(full_indices + first_entry + column, 0, mask=exists & (column >= full_count))


@triton.jit
def _interval(lo, hi, at, present, offset, EMPTY: tl.constexpr):
    """(where an interval of each row begins, its width); `(EMPTY, 0)` where it has no keys."""
    low = tl.load(lo + at, mask=present, other=EMPTY)
    high = tl.load(hi + at, mask=present, other=0)
    seen = low < high
    return tl.where(seen, low + offset, EMPTY), tl.where(seen, high - low, 0)


@triton.jit
def _tag_range(tags, tile, exists):
    """(first tag, last tag, whether all have one) of a tile's tokens."""
    first = tl.load(tags + 3 * tile, mask=exists, other=0)
    return (
        first,
        tl.load(tags + 3 * tile + 1, mask=exists, other=-1),
        tl.load(tags + 3 * tile + 2, mask=exists, other=0),
    )


launch_tile_lists = Launcher(tile_lists_kernel)
