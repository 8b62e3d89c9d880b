"""Row bounds transposed, key tiles and write order, against dense masks over random and ugly batches, on the CPU."""

from __future__ import annotations

import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.geometry import key_bounds as kb
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.geometry.row_tiles import key_tile_ends, row_tiles, visitors_before
from fa4_prefixlm.masks import causal, prefix, query_in, same_span, window
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO
from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch, random_mask, random_spans
from fa4_prefixlm.testing.empty_rows import Blind
from fa4_prefixlm.testing.stages import prepare

TILES = ((128, 128), (64, 128), (64, 96), (64, 80), (64, 48), (64, 64))


def check(
    batch: Batch, bounds: Bounds, sequence, lengths, keys: kb.KeyBounds, tile_m: int, tile_n: int, tight: bool = True
) -> None:
    tiles = row_tiles(keys, lengths, tile_m, tile_n)
    ends = key_tile_ends(bounds, lengths, tile_m, tile_n) if keys.rising else None
    order = visitors_before(tiles, lengths, tile_m, tile_n)
    for index, (rows, count) in enumerate(batch.seqlens):
        query, key = batch.cu_q[index], batch.cu_k[index]
        own = slice(query, query + rows)
        kv = torch.arange(count)
        dense = ((kv >= bounds.lo[own, :, None]) & (kv < bounds.hi[own, :, None])).any(1)
        row = torch.arange(rows)
        begin, end = keys.begin[key : key + count], keys.end[key : key + count]
        transposed = ((row >= begin[:, :, None]) & (row < end[:, :, None])).any(1)
        assert torch.equal(transposed.T, dense)
        assert ((begin >= 0) & (end <= rows)).all()
        query_tiles, key_tiles = -(-rows // tile_m), -(-count // tile_n)
        visits = torch.zeros(key_tiles, query_tiles, dtype=torch.bool)
        for n in range(key_tiles):
            slot = key // tile_n + index + n
            first, full_first, full_end, last = tiles[slot].tolist()
            assert 0 <= first <= full_first <= full_end <= last <= query_tiles
            columns = dense[:, n * tile_n : (n + 1) * tile_n]
            seen = [m for m in range(query_tiles) if columns[m * tile_m : (m + 1) * tile_m].any()]
            if seen:
                assert (first, last) == (seen[0], seen[-1] + 1)
            for m in range(full_first, full_end):
                whole = columns[m * tile_m : (m + 1) * tile_m]
                assert whole.all()
                assert whole.shape == (tile_m, tile_n)
            visits[n, first:last] = True
        for m in range(query_tiles):
            for n in range(key_tiles):
                if not visits[n, m]:
                    continue
                others = int(visits[n + 1 :, m].sum())
                slot = key // tile_n + index + n
                assert order[slot, m] == others
                if ends is not None:
                    assert ends[query // tile_m + index + m] - 1 - n == others


def both_ways(batch: Batch, mask: fp.Mask, tile: tuple[int, int], *, rising: bool, spans=None) -> None:
    stages = prepare(batch, mask, spans if mask.names else {})
    sequence = stages.where.sequence
    assert kb.rises(stages.traits.closed_form, stages.sizes) == rising
    spread = kb._Spread(stages.bounds, sequence.long(), stages.sizes)
    count = max(1, int(spread.intervals_per_key()))
    begin, end = spread.key_bounds(count)
    check(batch, stages.bounds, sequence, stages.sizes, kb.KeyBounds(begin, end, False), *tile)
    if rising:
        keys = kb.rising_key_bounds(stages.bounds, sequence, stages.sizes)
        check(batch, stages.bounds, sequence, stages.sizes, keys, *tile)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_random_batches(seed: int, tile: tuple[int, int]) -> None:
    rng = random.Random(f"{seed} {tile}")
    batch = random_batch(rng)
    both_ways(batch, random_mask(rng), tile, rising=True)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", UGLY)
def test_ugly_batches(name: str, tile: tuple[int, int]) -> None:
    for mask in (fp.PrefixLM(), fp.PrefixLM(40), fp.PrefixLM(40, clamp=False), fp.PrefixLM(1)):
        both_ways(UGLY[name], mask, tile, rising=True)


@pytest.mark.parametrize("tile", TILES[::3], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_windows_that_look_right(seed: int, tile: tuple[int, int]) -> None:
    rng = random.Random(f"{seed} {tile}")
    left, right = rng.choice([None, 1, 40, 130]), rng.choice([None, 1, 17, 64, 200])
    batch, plain, near = random_batch(rng), Batch(((300, 300), (9, 77)), ((), ())), window(left, right)
    both_ways(plain, near, tile, rising=True)
    both_ways(batch, near | same_span("image"), tile, rising=True)
    both_ways(batch, (causal | same_span("image")) & window(40, 17), tile, rising=True)
    both_ways(batch, causal | same_span("image") & causal | window(9, 5) & same_span("image"), tile, rising=True)
    both_ways(batch, window(40) & causal | window(60, 9) & query_in("image"), tile, rising=False)
    both_ways(batch, window(40) & causal | same_span("image", before=40), tile, rising=True)
    both_ways(batch, window(40) & causal | same_span("image", before=41), tile, rising=False)
    both_ways(batch, causal | same_span("image", before=90), tile, rising=True)


@pytest.mark.parametrize("seed", range(6))
def test_two_sets_rise_where_both_do(seed: int) -> None:
    rng = random.Random(seed)
    batch = random_batch(rng)
    other = tuple(random_spans(rng, keys) for _, keys in batch.seqlens)
    spans = {"image": batch.spans, "canvas": other}
    near = window(40) & causal | same_span("image")
    both_ways(batch, near | same_span("canvas", before=39), TILES[0], rising=True, spans=spans)
    both_ways(batch, near | same_span("canvas", before=60), TILES[2], rising=False, spans=spans)


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_see_nothing(seed: int) -> None:
    rng = random.Random(seed)
    both_ways(random_batch(rng, longest=300), Blind(), rng.choice(TILES), rising=False)


@pytest.mark.parametrize("seed", range(8))
def test_two_intervals_a_row_are_one_a_key(seed: int) -> None:
    """R-SWA: a prefix that every row sees, and a window."""
    rng = random.Random(seed)
    batch = random_batch(rng, longest=400)
    batch = Batch(batch.seqlens, tuple(((0, min(30, keys)),) * bool(keys) for _, keys in batch.seqlens))
    stages = prepare(batch, causal & (prefix("image") | window(60)))
    assert stages.bounds.count == 2
    keys = kb.any_key_bounds(stages.bounds, stages.where.sequence, stages.sizes, 1)
    assert isinstance(keys, kb.KeyBounds)
    assert keys.count == 1
    check(batch, stages.bounds, stages.where.sequence, stages.sizes, keys, *rng.choice(TILES))


def random_bounds(rng: random.Random, batch: Batch, count: int) -> Bounds:
    """Any intervals at all, the same for some rows in a row, or none; keys that nobody sees."""
    lo = torch.full((batch.cu_q[-1], count), EMPTY_LO, dtype=torch.int32)
    hi = torch.full_like(lo, EMPTY_HI)
    at = 0
    for rows, keys in batch.seqlens:
        for row in range(at, at + rows):
            if row > at and rng.random() < 0.9:
                lo[row], hi[row] = lo[row - 1], hi[row - 1]
                continue
            cuts = sorted(rng.sample(range(keys + 1), min(2 * count, (keys + 1) // 2 * 2)))
            for k, (begin, end) in enumerate(zip(cuts[::2], cuts[1::2], strict=True)):
                if rng.random() < 0.9:
                    lo[row, k], hi[row, k] = begin, end
        at += rows
    return Bounds(lo, hi)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_any_rows(seed: int, count: int) -> None:
    rng = random.Random(100 * count + seed)
    batch = random_batch(rng, longest=260)
    stages = prepare(batch, fp.PrefixLM())
    bounds, sequence = random_bounds(rng, batch, count), stages.where.sequence
    needed = kb.any_key_bounds(bounds, sequence, stages.sizes, 0)
    if isinstance(needed, kb.KeyBounds):
        assert needed.rising
        needed = 1
    if needed > 1:
        assert kb.any_key_bounds(bounds, sequence, stages.sizes, needed - 1) == needed
    keys = kb.any_key_bounds(bounds, sequence, stages.sizes, needed)
    check(batch, bounds, sequence, stages.sizes, keys, *rng.choice(TILES))


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_rise_in_jumps(seed: int) -> None:
    """Not a mask of the library: keys that nobody sees in between, rows without keys before all others."""
    rng = random.Random(seed)
    batch = random_batch(rng, longest=500)
    stages = prepare(batch, fp.PrefixLM())
    lo, hi = stages.bounds.lo.clone(), stages.bounds.hi.clone()
    at = 0
    for rows, keys in batch.seqlens:
        low = high = 0
        blind = rng.randint(0, 3) * (rng.random() < 0.4)
        for row in range(at, at + rows):
            low = min(low + rng.choice([0, 0, 1, 1, 1, rng.randint(0, 150)]), keys - 1)
            high = min(max(high, low + rng.randint(1, 9)), keys)
            hidden = row - at < blind
            lo[row], hi[row] = (EMPTY_LO, EMPTY_HI) if hidden else (low, high)
        at += rows
    bounds, sequence = Bounds(lo, hi), stages.where.sequence
    assert kb._is_rising(bounds, sequence)
    keys = kb.rising_key_bounds(bounds, sequence, stages.sizes)
    check(batch, bounds, sequence, stages.sizes, keys, *rng.choice(TILES), tight=False)


def test_masks_whose_rows_do_not_rise_are_told() -> None:
    batch = UGLY["span of one token"]
    for mask in (causal | fp.masks.query_in("image"), window(5) | fp.masks.query_in("image")):
        stages = prepare(batch, mask)
        assert not kb._is_rising(stages.bounds, stages.where.sequence)
        assert not kb.rises(stages.traits.closed_form, stages.sizes)
