"""Rows and key tiles, as kernels read them, of bounds that are given for each row: one launch.

The same as `geometry.tiles.tile_slots` of the bounds, clipped to the keys, bit for bit. Nothing synchronises.
"""

# Triton's functions are not typed.
# mypy: allow-untyped-defs, disable-error-code="import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fa4_prefixlm.geometry.tiles import ceil_div, power_of_two
from fa4_prefixlm.kernels.launch import Launcher
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO


def given_rows(
    bounds: torch.Tensor, keys: int, tile_tokens: int, tile_n: int, *, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rows, tiles)`, int32.

    Args:
        bounds: `(batch, rows, 2)` int32, `[lo, hi)` of each row.
        keys: of each sequence.
        tile_tokens, tile_n: query tokens and keys of a tile.
        padding: rows after the last one, `(0, 0)`.

    Returns:
        `(batch * rows + padding, 2)`, the bounds within the keys;
        `(slots, 4)`, the key tiles of each slot's query tile as `geometry.tiles.TileRuns` says them, 0 if it has none.
    """
    batch, rows, _ = bounds.shape
    device = bounds.device
    own = torch.zeros(batch * rows + padding, 2, dtype=torch.int32, device=device)
    tiles = torch.zeros(batch * rows // tile_tokens + batch + 1, 4, dtype=torch.int32, device=device)
    each = ceil_div(rows, tile_tokens)
    with torch.cuda.device_of(bounds):
        launch_given_rows(
            batch * each,
            (bounds.contiguous(), own, tiles),
            (rows, keys, each),
            {
                "TILE_TOKENS": tile_tokens,
                "TILE_N": tile_n,
                "ROWS": power_of_two(tile_tokens),
                "EMPTY_LO": EMPTY_LO,
                "EMPTY_HI": EMPTY_HI,
            },
        )
    return own, tiles


@triton.jit(do_not_specialize=("rows", "keys", "each"))
def given_rows_kernel(
    bounds,
    own,
    tiles,
    rows,
    keys,
    each,
    TILE_TOKENS: tl.constexpr,
    TILE_N: tl.constexpr,
    ROWS: tl.constexpr,
    EMPTY_LO: tl.constexpr,
    EMPTY_HI: tl.constexpr,
):
    """Program `(sequence, tile)` writes the rows of that query tile and its key tiles."""
    sequence = tl.program_id(0) // each
    tile = tl.program_id(0) % each
    row = tile * TILE_TOKENS + tl.arange(0, ROWS)
    inside = (tl.arange(0, ROWS) < TILE_TOKENS) & (row < rows)
    at = (sequence.to(tl.int64) * rows + row) * 2
    lo = tl.maximum(tl.load(bounds + at, mask=inside, other=EMPTY_LO), 0)
    hi = tl.minimum(tl.load(bounds + at + 1, mask=inside, other=EMPTY_HI), keys)
    empty = lo >= hi
    lo, hi = tl.where(empty, EMPTY_LO, lo), tl.where(empty, EMPTY_HI, hi)
    tl.store(own + at, lo, mask=inside)
    tl.store(own + at + 1, hi, mask=inside)

    # As in geometry.tiles.tile_runs; where some row sees nothing, no key tile is full.
    first_lo, last_hi = tl.min(lo, axis=0), tl.max(hi, axis=0)
    last_lo = tl.max(tl.where(inside, lo, 0), axis=0)
    first_hi = tl.min(tl.where(inside, hi, EMPTY_LO), axis=0)
    blind = first_lo >= last_hi
    first = tl.where(blind, 0, first_lo // TILE_N)
    end = tl.where(blind, 0, (last_hi + TILE_N - 1) // TILE_N)
    full_first = tl.minimum(last_lo // TILE_N + (last_lo % TILE_N > 0).to(tl.int32), end)
    full_end = tl.minimum(first_hi // TILE_N, end)
    some = full_first < full_end
    slot = tiles + ((sequence.to(tl.int64) * rows) // TILE_TOKENS + sequence + tile) * 4
    tl.store(slot, first)
    tl.store(slot + 1, tl.where(some, full_first, first))
    tl.store(slot + 2, tl.where(some, full_end, first))
    tl.store(slot + 3, end)


launch_given_rows = Launcher(given_rows_kernel)
