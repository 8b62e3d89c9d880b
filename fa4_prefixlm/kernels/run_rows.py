"""One run of keys for every row, from a mask that two terms say, and what the host has to know of it, in one launch.

The rows of a sequence stand at consecutive positions. A term shows a row the keys from `left` before its position to
`right` after it; of those, if it says so, only the ones of the row's own id, and only the real ones. A row sees what
either term shows it. Where that may be no single run, of any row, all bounds are no good.

The same as `integrations.transformers.row_runs.bounds_of_runs` and what is read of it, in a hundred operations of
torch. Nothing synchronises.
"""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fa4_prefixlm.geometry.tiles import ceil_div
from fa4_prefixlm.kernels.launch import Launcher
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO

# (left, right, of the own id alone, real ones alone)
Term = tuple[int, int, bool, bool]

BLOCK = 256
# Keys, or neighbours of a block, that are looked at together.
TOGETHER = 1024
NUMBERS, SEVERAL = 8, 1  # how many, and which of them says that the bounds are no good


def run_rows(
    terms: Sequence[Term],
    ids: torch.Tensor | None,
    real: torch.Tensor | None,
    first: torch.Tensor | int,
    shape: tuple[int, int],
    keys: tuple[int, int],
    device: torch.device,
    *,
    negative: bool,
    no_good: int,
    limit: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(bounds, numbers)` of `shape`, `(batch, rows)`; int32 on the device.

    Args:
        terms: one or two.
        ids: int32 or int64 `(batch or 1, positions)`, its rows contiguous; positions past it have no id.
        real: bool `(batch or 1, positions)`, its rows contiguous; keys past it are not real.
        first: the position of a sequence's first row; a tensor: of one integer.
        keys: the position of the first key, and that after the last.
        negative: negative ids count too.
        no_good: what all bounds are, where they are no good.
        limit: more than any sum of a bound and a row's number.

    Returns:
        `(batch, 1, rows, 2)`, `lo` before `hi`, counted from the first key; and what
        `integrations.transformers.masks.Reading` lists, `(8,)`.
    """
    batch, rows = shape
    own_rows, width = (0, 0) if ids is None else ids.shape
    # Behind the numbers is a table for each row of ids: how many runs an id has.
    counts = torch.zeros(NUMBERS + own_rows * (width + 2), dtype=torch.int32, device=device)
    bounds = torch.empty(batch, 1, rows, 2, dtype=torch.int32, device=device)
    blocks = ceil_div(max(rows, width), BLOCK)
    with torch.cuda.device_of(bounds):
        launch_run_rows(
            batch * blocks,
            (bounds, counts, *(own if isinstance(own, torch.Tensor) else counts for own in (ids, real, first))),
            (
                blocks,
                rows,
                *((0, 1) if isinstance(first, torch.Tensor) else (first, 0)),
                *keys,
                own_rows,
                width,
                0 if ids is None or own_rows == 1 else ids.stride(0),
                int(negative),
                0 if real is None else real.shape[1],
                0 if real is None or real.shape[0] == 1 else real.stride(0),
                *map(int, terms[0]),
                *map(int, terms[-1]),
                limit,
            ),
            {"BLOCK": BLOCK, "TOGETHER": TOGETHER, "EMPTY_LO": EMPTY_LO, "EMPTY_HI": EMPTY_HI, "NUMBERS": NUMBERS},
        )
    numbers = counts.narrow(0, 0, NUMBERS)
    bounds.masked_fill_(numbers.view(torch.bool)[4 * SEVERAL], no_good)  # the lowest of its four bytes
    return bounds, numbers


INTEGERS = (
    *("blocks", "rows", "first", "first_is_there", "kv_begin", "kv_end"),
    *("own_rows", "width", "own_stride", "negative", "real_width", "real_stride"),
    *("left", "right", "own", "unpadded", "left_2", "right_2", "own_2", "unpadded_2", "limit"),
)


@triton.jit(do_not_specialize=INTEGERS)
def run_rows_kernel(
    bounds,
    counts,
    ids,
    real,
    first_there,
    blocks,
    rows,
    first,
    first_is_there,
    kv_begin,
    kv_end,
    own_rows,
    width,
    own_stride,
    negative,
    real_width,
    real_stride,
    left,
    right,
    own,
    unpadded,
    left_2,
    right_2,
    own_2,
    unpadded_2,
    limit,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    EMPTY_LO: tl.constexpr,
    EMPTY_HI: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """Program `(sequence, block)` writes a block of rows, and counts the runs of ids that begin in a block of those."""
    sequence = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row = block * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    first += tl.load(first_there, mask=first_is_there != 0, other=0).to(tl.int32)
    position = first + row

    start = tl.zeros([BLOCK], tl.int32)
    stop = tl.zeros([BLOCK], tl.int32)
    several = tl.zeros([BLOCK], tl.int32)
    if own + own_2 > 0:
        ids += sequence.to(tl.int64) * own_stride
        start, stop = _own_run(ids, first + block * BLOCK, width, negative, BLOCK, TOGETHER)
        if sequence < own_rows:
            table = counts + NUMBERS + sequence.to(tl.int64) * (width + 2)
            several = _runs_before(table, ids, row, width, negative)
    real_begin, real_end = kv_begin, kv_end
    holes = tl.zeros([], tl.int32)
    if unpadded + unpadded_2 > 0:
        real += sequence.to(tl.int64) * real_stride
        real_begin, real_end, holes = _real_run(real, kv_begin, tl.minimum(kv_end, real_width), TOGETHER)

    lo, hi = _shown(left, right, own, unpadded, position, start, stop, real_begin, real_end, kv_begin, kv_end)
    lo_2, hi_2 = _shown(
        left_2, right_2, own_2, unpadded_2, position, start, stop, real_begin, real_end, kv_begin, kv_end
    )
    used, used_2 = lo < hi, lo_2 < hi_2
    several |= (inside & used & used_2 & (tl.maximum(lo, lo_2) > tl.minimum(hi, hi_2))).to(tl.int32)
    lo, hi = (
        tl.minimum(tl.where(used, lo, EMPTY_LO), tl.where(used_2, lo_2, EMPTY_LO)),
        tl.maximum(tl.where(used, hi, EMPTY_HI), tl.where(used_2, hi_2, EMPTY_HI)),
    )
    used |= used_2
    lo, hi = tl.where(used, lo - kv_begin, lo), tl.where(used, hi - kv_begin, hi)
    at = bounds + (sequence.to(tl.int64) * rows + row) * 2
    tl.store(at, lo, mask=inside)
    tl.store(at + 1, hi, mask=inside)

    keys = tl.where(used, hi - lo, 0)
    last_end = hi + (rows - 1 - row)
    _reduce(counts, used.to(tl.int32), inside)
    _reduce(counts + 1, tl.maximum(several, holes), several >= 0)
    _reduce(counts + 2, (used == 0).to(tl.int32), inside)
    _reduce(counts + 3, keys, inside)
    _reduce(counts + 4, hi, inside)
    _reduce(counts + 5, last_end, inside)
    _reduce(counts + 6, limit - last_end, inside)
    _reduce(counts + 7, limit - keys, inside & used & (lo > 0))


launch_run_rows = Launcher(run_rows_kernel)


@triton.jit
def _reduce(number, values, counted):
    """Make the number at least as large as all values, which are not negative, that count."""
    tl.atomic_max(number, tl.max(tl.where(counted, values, 0), axis=0), sem="relaxed")


@triton.jit
def _shown(left, right, own, unpadded, position, start, stop, real_begin, real_end, kv_begin, kv_end):
    """What a term shows, within the keys."""
    lo = tl.maximum(position - left, kv_begin)
    hi = tl.minimum(position + 1 + right, kv_end)
    lo, hi = tl.where(own != 0, tl.maximum(lo, start), lo), tl.where(own != 0, tl.minimum(hi, stop), hi)
    lo = tl.where(unpadded != 0, tl.maximum(lo, real_begin), lo)
    return lo, tl.where(unpadded != 0, tl.minimum(hi, real_end), hi)


@triton.jit
def _largest(one, other):
    return tl.maximum(one, other)


@triton.jit
def _smallest(one, other):
    return tl.minimum(one, other)


@triton.jit
def _own_run(ids, begin, width, negative, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """The run of positions of one id that holds each position of the block that begins at `begin`; or an empty one."""
    position = begin + tl.arange(0, BLOCK)
    there = position < width
    own = tl.load(ids + position, mask=there, other=-1)
    before = tl.load(ids + position - 1, mask=there & (position > 0), other=-1)
    after = tl.load(ids + position + 1, mask=position < width - 1, other=-1)
    begins = there & ((position == 0) | (own != before))
    ends = there & ((position == width - 1) | (own != after))
    start = tl.associative_scan(tl.where(begins, position, -1), 0, _largest)
    stop = tl.associative_scan(tl.where(ends, position + 1, width + 1), 0, _smallest, reverse=True)

    # The block's first run may have begun before it, and its last one may end after it.
    edge = tl.load(ids + begin, mask=begin < width, other=-1)
    begun = tl.zeros([], tl.int32)
    at = begin
    looking = (begin < width) & ((edge >= 0) | (negative != 0))
    while looking & (at > 0):
        at -= TOGETHER
        near = at + tl.arange(0, TOGETHER)
        other = tl.load(ids + near, mask=(near >= 0) & (near < begin), other=0)
        differs = (near >= 0) & (near < begin) & (other != edge)
        begun = tl.max(tl.where(differs, near + 1, 0), axis=0)
        looking = begun == 0
    end = begin + BLOCK
    edge = tl.load(ids + end - 1, mask=end < width, other=-1)
    ended = width
    at = end
    looking = (end < width) & ((edge >= 0) | (negative != 0))
    while looking & (at < width):
        near = at + tl.arange(0, TOGETHER)
        other = tl.load(ids + near, mask=near < width, other=0)
        ended = tl.min(tl.where((near < width) & (other != edge), near, width), axis=0)
        looking = ended == width
        at += TOGETHER
    start = tl.where(start < 0, begun, start)
    stop = tl.where(stop > width, ended, stop)
    return start, tl.where(there & (tl.where(own >= 0, 1, negative) != 0), stop, 0)


@triton.jit
def _runs_before(table, ids, position, width, negative):
    """Whether a run begins at each position whose id has a run that was counted before: int32.

    Of ids that fit a table as long as the row: all others share its ends.
    """
    there = position < width
    own = tl.load(ids + position, mask=there, other=-1)
    before = tl.load(ids + position - 1, mask=there & (position > 0), other=-1)
    begins = there & ((position == 0) | (own != before)) & (tl.where(own >= 0, 1, negative) != 0)
    slot = (tl.minimum(tl.maximum(own, -1), width) + 1).to(tl.int32)
    runs = tl.atomic_add(table + slot, 1, mask=begins, sem="relaxed")
    return (begins & (runs > 0)).to(tl.int32)


@triton.jit
def _real_run(real, begin, end, TOGETHER: tl.constexpr):
    """The first True of `real[begin:end]`, the position after the last, and whether there is a False between, int32."""
    lo = tl.zeros([TOGETHER], tl.int32) + end
    hi = tl.zeros([TOGETHER], tl.int32)
    count = tl.zeros([TOGETHER], tl.int32)
    for at in range(begin, end, TOGETHER):
        key = at + tl.arange(0, TOGETHER)
        here = tl.load(real + key, mask=key < end, other=0) != 0
        lo = tl.minimum(lo, tl.where(here, key, end))
        hi = tl.maximum(hi, tl.where(here, key + 1, 0))
        count += here.to(tl.int32)
    lo, hi = tl.min(lo, axis=0), tl.max(hi, axis=0)
    return lo, hi, (tl.sum(count, axis=0) < hi - lo).to(tl.int32)
