"""The launch that takes given bounds to rows and tiles, in Triton's interpreter, against the torch path bit for bit.

Run in a process of its own, as `test_row_update.py` is.
"""

from __future__ import annotations

import random

import pytest
import torch

from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.backends.rows import kernel_rows
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.tensors import describe
from fa4_prefixlm.fa4.kernels.launch import PADDING
from fa4_prefixlm.masks.given import GivenRows
from fa4_prefixlm.masks.interval_lists import EMPTY_LO
from fa4_prefixlm.runtime.bounded_plans import BoundedBatch
from tests.kernels.cases import TILES
from tests.kernels.triton_processes import INTERPRETED, compile_for_hopper, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")
from fa4_prefixlm.kernels import given_rows as kernel


def check(bounds: torch.Tensor, keys: int, tile: tuple[int, int]) -> None:
    q, k = (torch.empty(bounds.shape[0], tokens, 2, 16, dtype=torch.bfloat16) for tokens in (bounds.shape[1], keys))
    own = BoundedBatch(describe(q, k, k), bounds)
    sizes = own.lengths
    wanted = kernel_rows(
        MaskedBatch(own.spec, GivenRows(bounds), {}, sizes, own.traits, Keys.contiguous(sizes), None), *tile
    )
    made = kernel.given_rows(bounds, keys, *tile, padding=PADDING)
    assert all(map(torch.equal, made, wanted))


def random_bounds(rng: random.Random, rows: int, keys: int) -> list[tuple[int, int]]:
    """Rows around a diagonal, in stretches that end alike; at times past the keys, and at times of no key."""
    found: list[tuple[int, int]] = []
    while len(found) < rows:
        lo, hi = sorted((rng.randint(0, keys), rng.randint(0, keys + 9)))
        alike = rng.choice((1, rng.randint(1, rows)))
        found += [rng.choice(((0, hi), (lo, hi)))] * alike if rng.random() < 0.9 else [(EMPTY_LO, 0), (7, 7)]
    return found[:rows]


if INTERPRETED:

    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_random_bounds(tile: tuple[int, int]) -> None:
        rng = random.Random(str(tile))
        for _ in range(12):
            batch, rows, keys = rng.randint(1, 3), rng.randint(1, 500), rng.randint(1, 700)
            check(torch.tensor([random_bounds(rng, rows, keys) for _ in range(batch)], dtype=torch.int32), keys, tile)

else:

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_it_compiles_for_hopper(tile: tuple[int, int]) -> None:
        pointers = dict.fromkeys(("bounds", "own", "tiles"), "*i32")
        constants: dict[str, object] = {"TILE_TOKENS": tile[0], "TILE_N": tile[1], "EMPTY_LO": EMPTY_LO, "EMPTY_HI": 0}
        constants["ROWS"] = 1 << (tile[0] - 1).bit_length()
        assert ".target sm_90" in compile_for_hopper(kernel.given_rows_kernel, pointers, constants)
