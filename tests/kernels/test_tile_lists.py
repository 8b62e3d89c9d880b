"""The launch that lists key tiles, in Triton's interpreter on the CPU, against the torch path bit for bit.

Run in a process of its own, as `test_row_update.py` is.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.masks import causal, key_in, one_block, window
from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch
from tests.kernels.cases import MASKS, TWO_SETS, same_lists, spans_of
from tests.kernels.triton_processes import INTERPRETED, compile_for_hopper, random_cases, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")
from fa4_prefixlm.backends.flex import BLOCK, LEAST_BLOCKS, tables_by_torch, tables_in_one_launch
from fa4_prefixlm.batch.lengths import as_one_sequence
from fa4_prefixlm.geometry.block_lists import packed_lists, varlen_lists
from fa4_prefixlm.geometry.tiles import ceil_div, query_tiles, tile_map
from fa4_prefixlm.kernels import tile_lists
from fa4_prefixlm.masks.interval_lists import EMPTY_LO
from tests.kernels.test_plan_rows import masked_batch

# Of one interval but no closed form, of several, of more than are compared one by one, and with tags.
MORE = (
    causal & (window(20) | key_in("image")),
    key_in("image"),
    causal | one_block("image"),
    causal & key_in("image"),
)


def check(batch: Batch, mask: fp.Mask, spans: object = None, *, rows: bool = False) -> None:
    """rows: from the rows of another launch, where the mask has a closed form."""
    given = masked_batch(batch, mask, spans=spans)
    blocks = [max(LEAST_BLOCKS, ceil_div(n, BLOCK)) for n in (given.lengths.total_q, given.lengths.total_k)]
    count, wanted, wanted_tiles = tables_by_torch(given, *blocks)
    own_count, made, tiles = tables_in_one_launch(dataclasses.replace(given, in_one_launch=rows), *blocks)
    assert count == own_count
    for name in ("ends", "row_tag", "key_tag", "counts", "full_counts"):
        mine, theirs = getattr(made, name), getattr(wanted, name)
        assert mine is theirs is None or torch.equal(mine, theirs), name
    for name in ("", "full_"):
        number = getattr(wanted, f"{name}counts").unsqueeze(3)
        mine, theirs = (getattr(own, f"{name}indices") for own in (made, wanted))
        column = torch.arange(mine.shape[3])
        assert torch.equal(mine, torch.where(column < number, theirs, 0)), name
    assert torch.equal(tiles.is_full, wanted_tiles.is_full)
    assert torch.equal(tiles.is_partial, wanted_tiles.is_partial)


def check_lists(batch: Batch, mask: fp.Mask, tile: tuple[int, int]) -> None:
    """Of a mask without tags, each sequence by itself and the batch as one, in tiles that need not be powers of two."""
    given = masked_batch(batch, mask)
    lengths, bounds, traits = given.lengths, given.bounds, dataclasses.replace(given.traits, banded=False)
    for own in (lengths, dataclasses.replace(lengths, seqlens_q=None, seqlens_k=None)):  # known to the host, and not
        tiles = query_tiles(own, tile[0])
        wanted = varlen_lists(tile_map(bounds, tiles, own, given.where, *tile), tiles, own, traits, *tile)
        same_lists(tile_lists.varlen_tile_lists(bounds.lo, bounds.hi, own, *tile), wanted)
    whole = as_one_sequence(lengths)
    where = given.where._replace(sequence=torch.zeros_like(given.where.sequence))
    seen = tile_map(given.packed_bounds, query_tiles(whole, tile[0]), whole, where, *tile)
    wanted = packed_lists(seen, lengths, traits, *tile)
    same_lists(tile_lists.packed_tile_lists(bounds.lo, bounds.hi, lengths, *tile), wanted)


if INTERPRETED:

    @pytest.mark.parametrize("tile", [(128, 128), (192, 80), (64, 96)], ids=str)
    @pytest.mark.parametrize("mask", [MORE[0], MORE[1], MORE[3], fp.PrefixLM(30)], ids=str)
    def test_lists_of_fa4(mask: fp.Mask, tile: tuple[int, int]) -> None:
        rng = random.Random(f"{mask}{tile}")
        for _ in range(random_cases(4)):
            check_lists(random_batch(rng, longest=900), mask, tile)

    @pytest.mark.parametrize("name", UGLY)
    def test_lists_of_ugly_batches(name: str) -> None:
        for mask in (MORE[0], MORE[3]):
            check_lists(UGLY[name], mask, (128, 80))

    def test_more_key_tiles_than_columns() -> None:
        images = tuple((at, at + 90) for at in range(0, 5000, 250))
        check_lists(Batch(((900, 5000), (0, 0), (300, 300)), (images, (), ())), MORE[0], (128, 64))

    @pytest.mark.parametrize("mask", [*MASKS, *TWO_SETS], ids=str)
    @pytest.mark.parametrize("rows", [True, False])
    def test_closed_forms(mask: fp.Mask, rows: bool) -> None:
        rng = random.Random(str(mask))
        for _ in range(random_cases(3)):
            batch = random_batch(rng)
            check(batch, mask, spans_of(rng, batch, mask), rows=rows)

    @pytest.mark.parametrize("mask", MORE, ids=str)
    def test_other_masks(mask: fp.Mask) -> None:
        rng = random.Random(str(mask))
        for _ in range(random_cases(6)):
            check(random_batch(rng, longest=900), mask)

    @pytest.mark.parametrize("batch", UGLY.values(), ids=list(UGLY))
    def test_ugly_batches(batch: Batch) -> None:
        for mask in (fp.PrefixLM(), fp.PrefixLM(100), *MORE):
            check(batch, mask)

    def test_more_blocks_than_columns_and_more_intervals_than_are_compared() -> None:
        images = tuple((at, at + 90) for at in range(0, 5000, 250))
        batch = Batch(((900, 5000), (0, 0), (300, 300)), (images, (), ()))
        assert tile_lists.COLUMNS * BLOCK < 5300
        for mask in (fp.PrefixLM(), *MORE):
            check(batch, mask)

else:

    def test_more_entries_than_kernels_count_are_refused() -> None:
        given = masked_batch(Batch(((200, 300),), ((),)), MORE[0])
        huge = dataclasses.replace(
            given.lengths, seqlens_q=None, seqlens_k=None, total_q=2**20, max_seqlen_q=2**20, max_seqlen_k=2**30
        )
        with pytest.raises(fp.InputError, match=r"cu_seqlens_k: expected block lists of fewer than 2\*\*31 entries"):
            tile_lists.varlen_tile_lists(given.bounds.lo, given.bounds.hi, huge, 128, 128)

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("kind", ["BY_SEQUENCE", "TAGGED", "MAPPED"])
    @pytest.mark.parametrize("tile", [(128, 128), (192, 80)], ids=str)
    def test_it_compiles_for_hopper(kind: str, tile: tuple[int, int]) -> None:
        names = ("lo", "hi", "cu_seqlens_q", "cu_seqlens_k", "cu_tiles", "cu_entries")
        names += ("ends", "counts", "indices", "full_counts", "full_indices", "row_tags", "key_tags")
        maps = "*i1" if kind == "MAPPED" else "*i32"
        pointers = dict.fromkeys(names, "*i32") | dict.fromkeys(("is_full", "is_partial"), maps)
        constants: dict[str, object] = {name: name == kind for name in ("BY_SEQUENCE", "TAGGED", "MAPPED")}
        rows = 1 << (tile[0] - 1).bit_length()
        constants |= {
            "EMPTY": EMPTY_LO,
            "TILE_M": tile[0],
            "TILE_N": tile[1],
            "ROWS": rows,
            "COLUMNS": tile_lists.COLUMNS,
        }
        kernel = tile_lists.tile_lists_kernel
        assert ".target sm_90" in compile_for_hopper(kernel, pointers, constants)
