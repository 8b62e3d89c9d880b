"""What `flex` reads of a mask, made in one launch: where the intervals of rows begin, their widths, and the blocks.

The same numbers as `geometry.packed_row_tiles.packed_map` and the lists made of it take some hundred launches for, each
a few microseconds of the host's time. Nothing synchronises.
"""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.kernels.launch import Launcher
from fa4_prefixlm.masks.interval_lists import EMPTY_LO

# Blocks of keys that a program looks at together.
COLUMNS = 32


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
    tagged: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> BlockTables:
    """The tables of a batch.

    Args:
        lo, hi: `(>= total_q, K)` int32 on the device, of the same strides: `[lo, hi)` of each row, local to its
            sequence's keys, disjoint; `lo >= hi` is an empty one.
        lengths: of the sequences.
        rows, keys: blocks of queries and of keys, enough for the batch; rows past it see nothing.
        block: tokens of a block, a power of two.
        intervals: of the ends, at least K; those past K are empty. 0: no ends are made.
        tagged: `(every, some)`, `(rows, keys)` bool: blocks that all rows see whole, and that some see, besides.
    """
    device, total_q, batch = lo.device, lengths.total_q, lengths.batch

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    made = BlockTables(
        ends=empty(2 * intervals, rows, block),
        counts=empty(1, 1, rows),
        indices=empty(1, 1, rows, keys),
        full_counts=empty(1, 1, rows),
        full_indices=empty(1, 1, rows, keys),
        is_full=empty(rows, keys, dtype=torch.bool),
        is_partial=empty(rows, keys, dtype=torch.bool),
    )
    # `hi` may be a view into the memory of `lo`, which its own address is not aligned in.
    shared = hi.untyped_storage().data_ptr() == lo.untyped_storage().data_ptr()
    every, some = (made.is_full, made.is_partial) if tagged is None else tagged
    with torch.cuda.device_of(lo):
        launch_block_tables(
            rows,
            (lo, lo if shared else hi, lengths.cu_seqlens_q, lengths.cu_seqlens_k, every, some, *made),
            (
                *lo.stride(),
                int(hi.storage_offset() - lo.storage_offset()) if shared else 0,
                total_q,
                batch,
                batch.bit_length(),
                lo.shape[1],
                intervals,
                keys,
            ),
            {"TAGGED": tagged is not None, "EMPTY": EMPTY_LO, "BLOCK": block, "COLUMNS": COLUMNS},
        )
    return made


_NUMBERS = (
    *("stride_row", "stride_interval", "hi_offset", "total_q", "batch", "levels", "given", "intervals"),
    "key_blocks",
)


@triton.jit(do_not_specialize=_NUMBERS)
def block_tables_kernel(
    lo,
    hi,
    cu_seqlens_q,
    cu_seqlens_k,
    every,
    some,
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
    batch,
    levels,
    given,
    intervals,
    key_blocks,
    TAGGED: tl.constexpr,
    EMPTY: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program `b` writes what block `b` of queries reads."""
    row_block = tl.program_id(0)
    token = tl.arange(0, BLOCK)
    row = row_block * BLOCK + token
    inside = row < total_q
    # Where sequences begin ascends: a row's sequence is the last one that begins at or before it.
    sequence = tl.zeros([BLOCK], tl.int32)
    for level in range(levels):
        later = sequence + (1 << (levels - 1 - level))
        first_row = tl.load(cu_seqlens_q + tl.minimum(later, batch))
        sequence = tl.where((later < batch) & (first_row <= row), later, sequence)
    offset = tl.load(cu_seqlens_k + sequence, mask=inside, other=0)
    first_of_row = row.to(tl.int64) * stride_row

    padded_rows = tl.num_programs(0).to(tl.int64) * BLOCK
    for n in range(intervals):
        is_given = tl.zeros_like(row) + n < given
        at = first_of_row + n * stride_interval
        low, width = _interval(lo, hi + hi_offset, at, inside & is_given, offset, EMPTY)
        low = tl.where(is_given, low, 0)
        tl.store(ends + 2 * n * padded_rows + row, low ^ -2147483648)
        tl.store(ends + (2 * n + 1) * padded_rows + row, width ^ -2147483648)

    partial_count = 0
    full_count = 0
    first_of_block = row_block.to(tl.int64) * key_blocks
    for first in range(0, key_blocks, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        exists = column < key_blocks
        begin = (column * BLOCK)[None, :]
        touched = tl.zeros([COLUMNS], tl.int32)
        filled = tl.zeros([COLUMNS], tl.int32)
        for n in range(given):
            low, width = _interval(lo, hi + hi_offset, first_of_row + n * stride_interval, inside, offset, EMPTY)
            high = tl.where(width > 0, low + width, 0)[:, None]
            low = low[:, None]
            touched |= tl.max(((low < begin + BLOCK) & (high > begin)).to(tl.int32), axis=0)
            filled += tl.sum(((low <= begin) & (high >= begin + BLOCK)).to(tl.int32), axis=0)
        whole = exists & (filled == BLOCK)
        partly = exists & (touched > 0)
        at = first_of_block + column
        if TAGGED:
            whole |= tl.load(every + at, mask=exists, other=0) != 0
            partly |= tl.load(some + at, mask=exists, other=0) != 0
        partly &= whole == 0
        tl.store(is_full + at, whole, mask=exists)
        tl.store(is_partial + at, partly, mask=exists)
        place = partial_count + tl.cumsum(partly.to(tl.int32), axis=0) - 1
        tl.store(indices + first_of_block + place, column, mask=partly)
        place = full_count + tl.cumsum(whole.to(tl.int32), axis=0) - 1
        tl.store(full_indices + first_of_block + place, column, mask=whole)
        partial_count += tl.sum(partly.to(tl.int32), axis=0)
        full_count += tl.sum(whole.to(tl.int32), axis=0)
    tl.store(counts + row_block, partial_count)
    tl.store(full_counts + row_block, full_count)
    for first in range(0, key_blocks, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        exists = column < key_blocks
        tl.store(indices + first_of_block + column, 0, mask=exists & (column >= partial_count))
        tl.store(full_indices + first_of_block + column, 0, mask=exists & (column >= full_count))


@triton.jit
def _interval(lo, hi, at, present, offset, EMPTY: tl.constexpr):
    """(where an interval of each row begins in the packed keys, its width); `(EMPTY, 0)` where it has no keys."""
    low = tl.load(lo + at, mask=present, other=EMPTY)
    high = tl.load(hi + at, mask=present, other=0)
    seen = low < high
    return tl.where(seen, low + offset, EMPTY), tl.where(seen, high - low, 0)


launch_block_tables = Launcher(block_tables_kernel)
