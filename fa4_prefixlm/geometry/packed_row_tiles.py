"""The query tiles of each key tile, for a batch that a kernel sees as one sequence. Nothing synchronises."""

from __future__ import annotations

import dataclasses

import torch

from fa4_prefixlm.batch.lengths import Lengths, as_one_sequence
from fa4_prefixlm.geometry.block_lists import BlockLists
from fa4_prefixlm.geometry.intervals import Bounds, Tags, tokens
from fa4_prefixlm.geometry.tiles import TileMap, ceil_div, query_tiles, tile_map


def packed_row_lists(bounds: Bounds, lengths: Lengths, tile_m: int, tile_n: int) -> BlockLists:
    """FA4's block-sparse tensors of a backward: counts `(1, 1, key_tiles)`, indices `(1, 1, key_tiles, query_tiles)`.

    bounds: counting the packed keys of the whole batch.
    """
    rows = transposed(packed_map(bounds, as_one_sequence(lengths), lengths.batch, tile_m, tile_n))
    columns = ceil_div(lengths.total_q, tile_m)
    return BlockLists(
        partial_count=_as_4d(rows.partial),
        partial_idx=_as_4d(rows.partial_matrix(columns)),
        full_count=_as_4d(rows.full),
        full_idx=_as_4d(rows.full_matrix(columns)),
        cu_tiles=None,
        cu_entries=None,
        block_size=(tile_m, tile_n),
    )


def packed_map(bounds: Bounds, whole: Lengths, batch: int, tile_m: int, tile_n: int) -> TileMap:
    """The key tiles of each query tile of a batch of `batch` sequences that a kernel sees as the single one `whole`."""
    untagged = dataclasses.replace(bounds, tags=None)
    seen = tile_map(untagged, query_tiles(whole, tile_m), whole, tokens(whole), tile_m, tile_n)
    if bounds.tags is None:
        return seen
    every, some = tagged_tiles(bounds.tags, batch, whole.total_k, tile_m, tile_n)
    full = seen.is_full | every
    return TileMap(full, (seen.is_partial | some) & full.logical_not())


def transposed(seen: TileMap) -> TileMap:
    """The query tiles of each key tile."""
    return TileMap(*(flags.T.clone(memory_format=torch.contiguous_format) for flags in (seen.is_full, seen.is_partial)))


def tagged_tiles(tags: Tags, batch: int, total_k: int, tile_m: int, tile_n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(query_tiles, key_tiles)` bool: all pairs share a tag; some may (tags are sequences, and ascend)."""
    first_row, last_row, rows_whole = tag_ranges(tags.row_tag, tile_m, batch).unsqueeze(1).unbind(2)
    first_key, last_key, keys_whole = tag_ranges(tags.key_tag, tile_n, batch).unbind(1)
    some = (first_row <= last_key) & (first_key <= last_row)
    # Keys past the last one are masked in a partial tile only.
    inside = torch.arange(1, len(first_key) + 1, device=first_key.device) * tile_n <= total_k
    same = (first_row == last_key) & (last_row == first_key)
    return same & (rows_whole > 0) & ((keys_whole > 0) & inside), some


def tag_ranges(tag: torch.Tensor, tile: int, batch: int) -> torch.Tensor:
    """`(tiles, 3)` int32: the first and the last tag that a tile's tokens have, and 1 if all of them have one.

    Of a tile without tags the first is `batch`, and the last below 0.
    """
    count = ceil_div(len(tag), tile)
    tiles = torch.nn.functional.pad(tag, (0, count * tile - len(tag)), value=-3).view(count, tile)
    present = tiles >= 0
    first = tiles.masked_fill(present.logical_not(), batch).amin(1)
    return torch.stack([first, tiles.amax(1), (present | (tiles == -3)).all(1).to(torch.int32)], dim=1)


def _as_4d(per_tile: torch.Tensor) -> torch.Tensor:
    return per_tile.unsqueeze(0).unsqueeze(0)
