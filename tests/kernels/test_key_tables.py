"""The launch that transposes rising rows, in Triton's interpreter on the CPU, against the torch path."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import fa4_prefixlm as fp
from fa4_prefixlm.geometry.key_bounds import rising_key_bounds
from fa4_prefixlm.geometry.row_tiles import key_tile_ends, row_tiles
from fa4_prefixlm.kernels import key_tables
from fa4_prefixlm.kernels.key_tables import rising_key_tables
from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch, random_mask
from fa4_prefixlm.testing.stages import prepare
from tests.kernels.triton_processes import INTERPRETED, compile_for_hopper, run_interpreted

TILES = ((128, 128), (64, 96), (64, 48), (64, 80))
PADDING = 30


def check(batch: Batch, mask: fp.Mask, tile_m: int, tile_n: int) -> None:
    stages = prepare(batch, mask)
    lengths = stages.sizes
    keys = rising_key_bounds(stages.bounds, stages.where.sequence, lengths)
    tiles = row_tiles(keys, lengths, tile_m, tile_n)
    ends = key_tile_ends(stages.bounds, lengths, tile_m, tile_n)
    own_keys, own_tiles, own_ends = rising_key_tables(
        stages.bounds, lengths, tile_m, tile_n, padding=PADDING, ordered=True
    )
    assert torch.equal(own_keys[: lengths.total_k], torch.cat([keys.begin, keys.end], dim=1))
    assert not own_keys[lengths.total_k :].any()
    assert own_tiles.shape == tiles.shape
    assert own_ends.shape == ends.shape
    assert own_tiles.data_ptr() % 16 == 0
    for index, (rows, count) in enumerate(batch.seqlens):
        first = batch.cu_k[index] // tile_n + index
        live = slice(first, first - -count // tile_n)
        assert torch.equal(own_tiles[live], tiles[live])
        first = batch.cu_q[index] // tile_m + index
        live = slice(first, first - -rows // tile_m)
        assert torch.equal(own_ends[live], ends[live])


if INTERPRETED:

    @pytest.mark.parametrize("tile", TILES, ids=str)
    @pytest.mark.parametrize("seed", range(4))
    def test_random_batches(seed: int, tile: tuple[int, int]) -> None:
        rng = random.Random(f"{seed} {tile}")
        check(random_batch(rng), random_mask(rng), *tile)

    @pytest.mark.parametrize("name", UGLY)
    def test_ugly_batches(name: str) -> None:
        for mask in (fp.PrefixLM(), fp.PrefixLM(40, clamp=False), fp.PrefixLM(1)):
            check(UGLY[name], mask, 64, 48)

    def test_more_sequences_than_a_block() -> None:
        batch = Batch(tuple((n % 7, n % 11) if n % 7 <= n % 11 else (0, 3) for n in range(300)), ((),) * 300)
        check(batch, fp.PrefixLM(), 64, 80)

else:

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_it_compiles_for_hopper(tile: tuple[int, int]) -> None:
        pointers = dict.fromkeys(("lo", "hi", "cu_seqlens_q", "cu_seqlens_k", "keys", "tiles", "ends"), "*i32")
        constants = {"TILE_M": tile[0], "TILE_N": tile[1], "BLOCK": key_tables.BLOCK}
        assert "ld.global" in compile_for_hopper(key_tables.rising_key_tables_kernel, pointers, constants)
