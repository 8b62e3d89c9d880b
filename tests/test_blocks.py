"""Key tiles against the bounds they come from: nothing visible is left out, nothing hidden is called full."""

from __future__ import annotations

import random

import pytest
import torch
from cases import UGLY, Batch, Blind, dense, masks_for, prepare, random_batch, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from fa4_prefixlm import PrefixLM, blocks, intervals, lengths
from fa4_prefixlm.mask import Mask

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


def tiles_of(visible: torch.Tensor, rows: slice, block_n: int) -> tuple[set[int], set[int]]:
    """(tiles with anything visible, tiles with everything visible) of the rows of one query tile, by looking."""
    part = visible[rows]
    some, every = set(), set()
    for tile in range(blocks.ceil_div(part.shape[1], block_n)):
        inside = part[:, tile * block_n : (tile + 1) * block_n]
        if inside.any():
            some.add(tile)
        if inside.shape[1] == block_n and inside.all():
            every.add(tile)
    return some, every


def check_list(partial: list[int], full: list[int], some: set[int], every: set[int], exact: bool) -> None:
    assert partial == sorted(partial), "FA4 masks the end of the keys in the last partial tile only"
    assert full == sorted(full)
    assert not set(partial) & set(full)
    assert some <= set(partial) | set(full), "a visible tile is not visited"
    assert set(full) == every, "full tiles"
    if exact:
        assert set(partial) | set(full) == some, "a tile is visited for nothing"


def read(count: torch.Tensor, idx: torch.Tensor, at: int) -> list[int]:
    return idx[at : at + int(count)].tolist()


def check_varlen(
    batch: Batch, mask: Mask, block_m: int, block_n: int, on_host: bool = True, exact: bool = True
) -> None:
    sizes, spans, _, bounds = prepare(batch, mask)
    if not on_host:
        sizes = forget_host(sizes)
    tiles = blocks.query_tiles(sizes, block_m)
    runs = blocks.tile_runs(bounds, tiles, block_m, block_n)
    lists = blocks.varlen_lists(runs, tiles, sizes, mask.reach(spans.longest), block_m, block_n)
    assert lists.partial_idx.shape == lists.full_idx.shape
    assert lists.partial_count.shape == lists.full_count.shape == (1, len(tiles.row_start))
    assert lists.nbytes() <= blocks.varlen_bytes(sizes, block_m, block_n) + 8
    tile = 0
    for index, (rows, keys) in enumerate(batch.seqlens):
        begin = batch.cu_q[index]
        visible = dense(intervals.Bounds(bounds.lo[begin : begin + rows], bounds.hi[begin : begin + rows]), keys)
        assert int(lists.cu_tiles[index]) == tile
        for row in range(blocks.ceil_div(rows, block_m)):
            at = int(lists.cu_entries[index]) + row * blocks.ceil_div(keys, block_n)  # the kernel's own arithmetic
            check_list(
                read(lists.partial_count[0, tile], lists.partial_idx[0], at),
                read(lists.full_count[0, tile], lists.full_idx[0], at),
                *tiles_of(visible, slice(row * block_m, (row + 1) * block_m), block_n),
                exact,
            )
            tile += 1
    assert (lists.partial_count[0, tile:] == 0).all()
    assert (lists.full_count[0, tile:] == 0).all()


def check_packed(batch: Batch, mask: Mask, block_m: int, block_n: int, on_host: bool = True) -> None:
    sizes, spans, where, bounds = prepare(batch, mask)
    if not on_host:
        sizes = forget_host(sizes)
    whole = lengths.as_one_sequence(sizes)
    bounds = bounds.shifted(where.key_offset)
    runs = blocks.tile_runs(bounds, blocks.query_tiles(whole, block_m), block_m, block_n)
    lists = blocks.packed_lists(runs, sizes, mask.reach(spans.longest), block_m, block_n)
    everything = max(1, blocks.ceil_div(sizes.total_k, block_n))
    assert lists.partial_idx.shape[3] <= everything
    assert lists.full_idx.shape[3] <= everything
    assert lists.nbytes() <= blocks.packed_bytes(sizes, mask.reach(spans.longest), block_m, block_n)
    visible = dense(bounds, sizes.total_k)
    for row in range(blocks.ceil_div(sizes.total_q, block_m)):
        check_list(
            read(lists.partial_count[0, 0, row], lists.partial_idx[0, 0, row], 0),
            read(lists.full_count[0, 0, row], lists.full_idx[0, 0, row], 0),
            *tiles_of(visible, slice(row * block_m, (row + 1) * block_m), block_n),
            exact=len(batch.seqlens) == 1,  # a tile with rows of two sequences may list what lies between them
        )


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), tile=st.sampled_from(TILES), on_host=st.booleans())
def test_random_batches(seed: int, tile: tuple[int, int], on_host: bool) -> None:
    rng = random.Random(seed)
    batch, mask = random_batch(rng, longest=500), random_mask(rng)
    check_varlen(batch, mask, *tile, on_host=on_host)
    check_packed(batch, mask, *tile, on_host=on_host)


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
        check_varlen(batch, Blind(window), *tile)
        check_packed(batch, Blind(window), *tile)


def list_bytes(tokens: int, mask: Mask, layout: str, batch: int = 1, longest: int = 256) -> int:
    sizes = lengths.batched(batch, tokens, tokens, torch.device("cpu"))
    if layout == "varlen":
        return blocks.varlen_bytes(sizes, 128, 128)
    return blocks.packed_bytes(sizes, mask.reach(longest), 128, 128)


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
        def reach(self, longest_span: int):
            return PrefixLM(1).reach(1)

    batch = Batch(((600, 600),), (((0, 500),),))
    with pytest.raises(RuntimeError, match="longer than"):
        check_packed(batch, Liar(300), 16, 8)
    with pytest.raises(RuntimeError, match="longer than"):
        check_varlen(batch, Liar(300), 16, 8)
