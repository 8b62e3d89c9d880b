"""The bounds of all rows of a batch, from the few that tell: one copy to the device and one launch.

The same numbers as `geometry.telling_rows.Pieces.bounds`. Nothing synchronises.
"""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fa4_prefixlm.device_checks import to_device_together
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.geometry.telling_rows import Pieces
from fa4_prefixlm.geometry.tiles import ceil_div
from fa4_prefixlm.kernels.launch import Launcher
from fa4_prefixlm.kernels.search import last_begin

BLOCK = 128


def all_rows(pieces: Pieces, total_q: int, device: torch.device) -> Bounds:
    """`Pieces.bounds`."""
    here = to_device_together(pieces, device)
    count, intervals = pieces.lo.shape
    lo, hi = (torch.empty(total_q, intervals, dtype=torch.int32, device=device) for _ in range(2))
    with torch.cuda.device_of(lo):
        launch_all_rows(
            ceil_div(total_q, BLOCK),
            (*here, lo, hi),
            (total_q, count, count.bit_length(), intervals),
            {"BLOCK": BLOCK},
        )
    return Bounds(lo, hi)


@triton.jit(do_not_specialize=("total_q", "pieces", "levels", "intervals"))
def all_rows_kernel(
    begins,
    piece_lo,
    piece_hi,
    lo,
    hi,
    total_q,
    pieces,
    levels,
    intervals,
    BLOCK: tl.constexpr,
):
    """Program `b` writes the rows of block `b`."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < total_q
    piece = last_begin(begins, row, pieces, pieces - 1, levels)
    following = tl.minimum(piece + 1, pieces - 1)
    begin = tl.load(begins + piece)
    past = row - begin
    length = tl.load(begins + following) - begin
    at = piece.to(tl.int64) * intervals
    after = following.to(tl.int64) * intervals
    out = row.to(tl.int64) * intervals
    for n in range(intervals):
        low = tl.load(piece_lo + at + n)
        high = tl.load(piece_hi + at + n)
        low += tl.where(tl.load(piece_lo + after + n) - low == length, past, 0)
        high += tl.where(tl.load(piece_hi + after + n) - high == length, past, 0)
        tl.store(lo + out + n, low, mask=inside)
        tl.store(hi + out + n, high, mask=inside)


launch_all_rows = Launcher(all_rows_kernel)
