"""Where the tiles of a batch are found."""

from __future__ import annotations

import random

import pytest

import fa4_prefixlm as fp
from fa4_prefixlm.geometry.tiles import query_tiles, tile_runs, tile_slots
from fa4_prefixlm.testing.batches import random_batch
from fa4_prefixlm.testing.stages import prepare


@pytest.mark.parametrize("block", [(42, 64), (64, 128), (128, 80)])
def test_tile_slots(block: tuple[int, int]) -> None:
    for seed in range(20):
        stages = prepare(random_batch(random.Random(seed), longest=400), fp.PrefixLM(50))
        where_tiles = query_tiles(stages.sizes, block[0])
        runs = tile_runs(stages.bounds, where_tiles, *block)
        slots = tile_slots(runs, where_tiles, stages.sizes, block[0])
        filled = 0
        for index, rows in enumerate(stages.sizes.seqlens_q or ()):
            for tile in range(-(-rows // block[0])):
                slot = int(stages.sizes.cu_seqlens_q[index]) // block[0] + index + tile
                at = int(where_tiles.cu_tiles[index]) + tile
                four = (runs.first, runs.full_first, runs.full_end, runs.end)
                assert slots[slot].tolist() == [int(part[at]) for part in four]
                filled += 1
        assert (slots.any(1)).sum() <= filled
