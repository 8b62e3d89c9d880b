"""What the native backward reads of a mask whose rows rise, made in one launch: key bounds, key tiles, write order.

The same numbers as `geometry.key_bounds.rising_key_bounds`, `geometry.row_tiles.row_tiles` and `key_tile_ends` take
some forty launches for, each a few microseconds of the host's time. Nothing synchronises.
"""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.geometry.row_tiles import slot_count

BLOCK = 256


def rising_key_tables(
    bounds: Bounds, lengths: Lengths, tile_m: int, tile_n: int, *, padding: int, ordered: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`(key bounds, tiles, ends)` of rows of one interval that rise.

    Args:
        bounds: on the device, one interval a row.
        tile_m, tile_n: query rows and keys of a tile.
        padding: rows of zeros after the key bounds.
        ordered: whether the last is wanted; else it is None.

    Returns:
        `(total_k + padding, 2)` int32, `begin, end` of each key; `(slots, 4)` int32, see `row_tiles`, zero where a slot
        has no tile; `(slots,)` int32, see `key_tile_ends`.
    """
    total_q, total_k, batch = lengths.total_q, lengths.total_k, lengths.batch
    device = bounds.lo.device
    slots, slots_q = slot_count(total_k, batch, tile_n), slot_count(total_q, batch, tile_m)
    # One allocation: each begins at a multiple of 16 bytes.
    sizes = (2 * (total_k + padding), 4 * slots, slots_q if ordered else 0)
    starts = (0, _up(sizes[0], 4), _up(sizes[0], 4) + sizes[1])
    memory = torch.empty(starts[2] + sizes[2], dtype=torch.int32, device=device)
    parts = [memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    keys, tiles, ends = parts[0].view(-1, 2), parts[1].view(-1, 4), parts[2]
    programs = (-(-keys.shape[0] // BLOCK), -(-slots // BLOCK), -(-slots_q // BLOCK) if ordered else 0)
    with torch.cuda.device_of(memory):
        rising_key_tables_kernel[(sum(programs),)](
            bounds.lo,
            bounds.hi,
            lengths.cu_seqlens_q,
            lengths.cu_seqlens_k,
            keys,
            tiles,
            ends,
            bounds.lo.stride(0),
            bounds.hi.stride(0),
            batch,
            total_q,
            total_k,
            keys.shape[0],
            slots,
            slots_q,
            programs[0],
            programs[0] + programs[1],
            max(1, lengths.max_seqlen_q).bit_length(),
            batch.bit_length(),
            TILE_M=tile_m,
            TILE_N=tile_n,
            BLOCK=BLOCK,
        )
    return keys, tiles, ends if ordered else None


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


_NUMBERS = (
    *("lo_stride", "hi_stride", "batch", "total_q", "total_k", "key_rows", "slots", "slots_q"),
    *("first_tile_program", "first_end_program", "row_steps", "batch_steps"),
)


@triton.jit(do_not_specialize=_NUMBERS)
def rising_key_tables_kernel(
    lo,
    hi,
    cu_seqlens_q,
    cu_seqlens_k,
    keys,
    tiles,
    ends,
    lo_stride,
    hi_stride,
    batch,
    total_q,
    total_k,
    key_rows,
    slots,
    slots_q,
    first_tile_program,
    first_end_program,
    row_steps,
    batch_steps,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program works on `BLOCK` keys, or key tiles, or query tiles.

    row_steps, batch_steps: of binary searches among the rows of a sequence, and among sequences.
    """
    program = tl.program_id(0)
    if program < first_tile_program:
        key = program * BLOCK + tl.arange(0, BLOCK)
        inside = key < total_k
        sequence = _sequence_of(cu_seqlens_k, key, 1 << 30, batch, batch_steps)
        begin, end = _rows_that_see(
            lo, hi, cu_seqlens_q, cu_seqlens_k, sequence, key, inside, lo_stride, hi_stride, row_steps
        )
        stored = key < key_rows
        tl.store(keys + 2 * key, begin, mask=stored)
        tl.store(keys + 2 * key + 1, end, mask=stored)
    elif program < first_end_program:
        slot = (program - first_tile_program) * BLOCK + tl.arange(0, BLOCK)
        sequence = _sequence_of(cu_seqlens_k, slot, TILE_N, batch, batch_steps)
        first_token = tl.load(cu_seqlens_k + sequence)
        end_token = tl.load(cu_seqlens_k + sequence + 1)
        rows = tl.load(cu_seqlens_q + sequence + 1) - tl.load(cu_seqlens_q + sequence)
        first_key = first_token + (slot - (first_token // TILE_N + sequence)) * TILE_N
        live = (slot < slots) & (first_key >= first_token) & (first_key < end_token)
        last_key = tl.minimum(first_key + TILE_N, end_token) - 1
        begin_first, end_first = _rows_that_see(
            lo, hi, cu_seqlens_q, cu_seqlens_k, sequence, first_key, live, lo_stride, hi_stride, row_steps
        )
        begin_last, end_last = _rows_that_see(
            lo, hi, cu_seqlens_q, cu_seqlens_k, sequence, last_key, live, lo_stride, hi_stride, row_steps
        )
        # Keys that no row has reached begin after the last row: they visit no tile, not even that row's.
        first = tl.where(begin_first >= rows, (rows + (TILE_M - 1)) // TILE_M, begin_first // TILE_M)
        last = tl.maximum(first, (end_last + (TILE_M - 1)) // TILE_M)
        full_first, full_end = (begin_last + (TILE_M - 1)) // TILE_M, end_first // TILE_M
        full = (full_end > full_first) & (first_key + TILE_N <= end_token)
        entry = tiles + 4 * slot
        stored = slot < slots
        tl.store(entry, tl.where(live, first, 0), mask=stored)
        tl.store(entry + 1, tl.where(live, tl.where(full, full_first, first), 0), mask=stored)
        tl.store(entry + 2, tl.where(live, tl.where(full, full_end, first), 0), mask=stored)
        tl.store(entry + 3, tl.where(live, last, 0), mask=stored)
    else:
        slot = (program - first_end_program) * BLOCK + tl.arange(0, BLOCK)
        sequence = _sequence_of(cu_seqlens_q, slot, TILE_M, batch, batch_steps)
        first_token = tl.load(cu_seqlens_q + sequence)
        end_token = tl.load(cu_seqlens_q + sequence + 1)
        first_row = first_token + (slot - (first_token // TILE_M + sequence)) * TILE_M
        live = (slot < slots_q) & (first_row >= first_token) & (first_row < end_token)
        last_row = tl.minimum(first_row + TILE_M, end_token) - 1
        reach = tl.load(hi + last_row * hi_stride, mask=live, other=0)
        tl.store(ends + slot, (reach + (TILE_N - 1)) // TILE_N, mask=slot < slots_q)


@triton.jit
def _sequence_of(cu_seqlens, index, tile, batch, steps):
    """Whose tile it is, or whose token for a `tile` larger than all: the last sequence that begins at or before it.

    The tiles of a sequence begin at `cu_seqlens[b] // tile + b`. What is past the batch is the last sequence's.
    """
    low = index * 0
    high = low + (batch - 1)
    for _ in range(steps):  # the last b of [low, high] that begins at or before
        middle = (low + high + 1) // 2
        offset = tl.load(cu_seqlens + middle)
        start = offset if tile >= 1 << 30 else offset // tile + middle
        reached = start <= index
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, tl.maximum(middle - 1, low))
    return low


@triton.jit
def _rows_that_see(lo, hi, cu_seqlens_q, cu_seqlens_k, sequence, key, inside, lo_stride, hi_stride, steps):
    """`[begin, end)` of a packed key: the rows that end after it and begin at or before it; `(0, 0)` if not inside."""
    first_row = tl.load(cu_seqlens_q + sequence)
    end_row = tl.where(inside, tl.load(cu_seqlens_q + sequence + 1), first_row)
    local = key - tl.load(cu_seqlens_k + sequence)
    low, high = first_row, end_row  # rows that end at or before the key
    other_low, other_high = first_row, end_row  # rows that begin at or before it
    for _ in range(steps):
        middle = (low + high) // 2
        active = low < high
        passed = active & (tl.load(hi + middle * hi_stride, mask=active, other=0) <= local)
        low = tl.where(passed, middle + 1, low)
        high = tl.where(active & (passed == 0), middle, high)
        middle = (other_low + other_high) // 2
        active = other_low < other_high
        begins = tl.load(lo + middle * lo_stride, mask=active, other=0)
        # A row that sees nothing stands before all others.
        begins = tl.where(begins >= tl.load(hi + middle * hi_stride, mask=active, other=0), 0, begins)
        passed = active & (begins <= local)
        other_low = tl.where(passed, middle + 1, other_low)
        other_high = tl.where(active & (passed == 0), middle, other_high)
    begin = low - first_row
    return begin, tl.maximum(begin, other_low - first_row)
