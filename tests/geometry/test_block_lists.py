"""Key tiles against the bounds they come from: nothing visible is left out, nothing hidden is called full."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fa4_prefixlm import PrefixLM
from fa4_prefixlm.batch import lengths
from fa4_prefixlm.geometry import block_lists as blocks
from fa4_prefixlm.geometry import tiles as tiling
from fa4_prefixlm.geometry.traits import Traits
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.protocols import Reach
from fa4_prefixlm.testing.batches import UGLY, Batch, masks_for, random_batch, random_mask
from fa4_prefixlm.testing.empty_rows import Blind, ChainedBlind
from fa4_prefixlm.testing.stages import dense, prepare
from tests.geometry.tile_lists import check_list, read, tiles_of

TILES = ((128, 128), (192, 128), (128, 80), (128, 64), (256, 128), (16, 8))


def forget_host(sizes: lengths.Lengths) -> lengths.Lengths:
    """The same lengths as a device tensor would leave them: nothing known on the host but the totals."""
    return lengths.Lengths(
        sizes.cu_seqlens_q,
        sizes.cu_seqlens_k,
        sizes.total_q,
        sizes.total_k,
        sizes.total_q,
        sizes.total_k,
        None,
        None,
        False,
    )


def check_varlen(batch: Batch, mask: Mask, block_m: int, block_n: int, on_host: bool = True, banded=None) -> None:
    stage = prepare(batch, mask)
    traits = stage.traits if banded is None else dataclasses.replace(stage.traits, banded=banded)
    sizes = stage.sizes if on_host else forget_host(stage.sizes)
    tiles = tiling.query_tiles(sizes, block_m)
    found = tiling.classify(stage.bounds, tiles, sizes, stage.where, block_m, block_n, banded=traits.banded)
    lists = blocks.varlen_lists(found, tiles, sizes, traits, block_m, block_n)
    assert lists.partial_idx.shape == lists.full_idx.shape
    assert lists.partial_count.shape == lists.full_count.shape == (1, len(tiles.row_start))
    assert lists.nbytes() <= blocks.varlen_bytes(sizes, block_m, block_n) + 8
    tile = 0
    for index, (rows, keys) in enumerate(batch.seqlens):
        begin = batch.cu_q[index]
        visible = dense(stage.bounds, keys, slice(begin, begin + rows))
        assert int(lists.cu_tiles[index]) == tile
        for row in range(tiling.ceil_div(rows, block_m)):
            at = int(lists.cu_entries[index]) + row * tiling.ceil_div(keys, block_n)  # the kernel's own arithmetic
            check_list(
                read(lists.partial_count[0, tile], lists.partial_idx[0], at),
                read(lists.full_count[0, tile], lists.full_idx[0], at),
                *tiles_of(visible, slice(row * block_m, (row + 1) * block_m), block_n),
                exact=not isinstance(mask, ChainedBlind),
            )
            tile += 1
    assert (lists.partial_count[0, tile:] == 0).all()
    assert (lists.full_count[0, tile:] == 0).all()


def check_packed(batch: Batch, mask: Mask, block_m: int, block_n: int, on_host: bool = True, banded=None) -> None:
    stage = prepare(batch, mask)
    traits = stage.traits if banded is None else dataclasses.replace(stage.traits, banded=banded)
    sizes = stage.sizes if on_host else forget_host(stage.sizes)
    whole = lengths.as_one_sequence(sizes)
    bounds = stage.bounds.shifted(stage.where.key_offset)
    where = stage.where._replace(sequence=torch.zeros_like(stage.where.sequence))
    tiles = tiling.query_tiles(whole, block_m)
    found = tiling.classify(bounds, tiles, whole, where, block_m, block_n, banded=traits.banded)
    lists = blocks.packed_lists(found, sizes, traits, block_m, block_n)
    everything = max(1, tiling.ceil_div(sizes.total_k, block_n))
    assert lists.partial_idx.shape[3] <= everything
    assert lists.full_idx.shape[3] <= everything
    assert lists.nbytes() <= max(blocks.packed_bytes(sizes, traits, block_m, block_n), 8 * lists.full_idx.numel() + 999)
    visible = dense(bounds, sizes.total_k)
    for row in range(tiling.ceil_div(sizes.total_q, block_m)):
        check_list(
            read(lists.partial_count[0, 0, row], lists.partial_idx[0, 0, row], 0),
            read(lists.full_count[0, 0, row], lists.full_idx[0, 0, row], 0),
            *tiles_of(visible, slice(row * block_m, (row + 1) * block_m), block_n),
            # From the extremes, a tile with rows of two sequences may list what lies between them.
            exact=not isinstance(mask, ChainedBlind) and (len(batch.seqlens) == 1 or not traits.banded),
        )


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), tile=st.sampled_from(TILES), on_host=st.booleans())
def test_random_batches(seed: int, tile: tuple[int, int], on_host: bool) -> None:
    rng = random.Random(seed)
    batch, mask = random_batch(rng, longest=500), random_mask(rng)
    for banded in (True, False):
        check_varlen(batch, mask, *tile, on_host=on_host, banded=banded)
        check_packed(batch, mask, *tile, on_host=on_host, banded=banded)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", UGLY)
def test_ugly_batches(name: str, tile: tuple[int, int]) -> None:
    for mask in masks_for(UGLY[name]):
        check_varlen(UGLY[name], mask, *tile)
        check_packed(UGLY[name], mask, *tile)


@pytest.mark.parametrize("window", [None, 100])
def test_rows_that_see_nothing_make_no_tile_full(window: int | None) -> None:
    batch = Batch(((900, 900), (150, 150)), (((100, 500),), ()))
    for tile in TILES:
        for mask in (Blind(window), ChainedBlind(window)):
            check_varlen(batch, mask, *tile)
            check_packed(batch, mask, *tile)


def list_bytes(tokens: int, mask: Mask, layout: str, batch: int = 1, longest: int = 256) -> int:
    sizes = lengths.batched(batch, tokens, tokens, torch.device("cpu"))
    if layout == "varlen":
        return blocks.varlen_bytes(sizes, 128, 128)
    traits = Traits(1, False, True, mask.reach({"image": longest}))
    return blocks.packed_bytes(sizes, traits, 128, 128)


@pytest.mark.parametrize("mask", [PrefixLM(1024), PrefixLM(1024, clamp=False), PrefixLM()], ids=str)
def test_packed_lists_grow_linearly_with_a_sequence(mask: Mask) -> None:
    sizes = [list_bytes(tokens, mask, "packed") for tokens in (2**16, 2**17, 2**20)]
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[2] <= 17 * sizes[0]
    assert sizes[2] < 4 * 2**20
    assert list_bytes(2**20, mask, "varlen") > 2**28, "the varlen layout does grow with the square"


def test_packed_lists_grow_linearly_with_the_batch() -> None:
    assert list_bytes(4096, PrefixLM(512), "packed", 64) <= 65 * list_bytes(4096, PrefixLM(512), "packed", 1)


def test_a_reach_that_is_too_small_is_noticed() -> None:
    class Liar(PrefixLM):
        def reach(self, longest):
            return Reach(0, 1)

    batch = Batch(((600, 600),), (((0, 500),),))
    with pytest.raises(RuntimeError, match="longer than"):
        check_packed(batch, Liar(300), 16, 8)
    with pytest.raises(RuntimeError, match="longer than"):
        check_varlen(batch, Liar(300), 16, 8)
