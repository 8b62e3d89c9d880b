"""Key tiles -> the block lists that FlashAttention-4 reads, in one of its two layouts.

- varlen: row `m` of sequence `b` begins at `cu_block_idx_offsets[b] + m * ceil(seqlen_k / tile_n)`. The kernel fixes
  that stride, so memory grows with `sum(seqlen_q * seqlen_k) / (tile_m * tile_n)`, whatever the mask; only the listed
  entries are ever written.
- packed: a matrix with as many columns as the longest list can have (`PackedWidth`). Windowed masks, and a single
  sequence whose rows all see key 0, need a number of columns that does not depend on the sequence's length: linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.device_checks import assert_on_device
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.geometry.tiles import KeyTiles, QueryTiles, TileRuns, ceil_div, count_query_tiles
from fa4_prefixlm.geometry.traits import Traits
from fa4_prefixlm.masks.protocols import Reach


@dataclass(frozen=True)
class BlockLists:
    """FlashAttention-4's block-sparse tensors, int32 on the device.

    The key tiles of query tile `m` are `idx[m, :count[m]]`, ascending. The varlen layout has counts `(1, query_tiles)`,
    indices `(1, entries)` and both `cu_*`; the packed one counts `(1, 1, query_tiles)` and indices `(1, 1, query_tiles,
    columns)`.

    Attributes:
        partial_count, partial_idx: tiles visited with a mask, upstream's `mask_block_*`.
        full_count, full_idx: tiles visited without one.
        cu_tiles: `(batch + 1,)`, the first query tile of each sequence; None: packed.
        cu_entries: `(batch + 1,)`, the first entry of each sequence in the indices; None: packed.
        block_size: query rows and keys of a tile.
    """

    partial_count: torch.Tensor
    partial_idx: torch.Tensor
    full_count: torch.Tensor
    full_idx: torch.Tensor
    cu_tiles: torch.Tensor | None
    cu_entries: torch.Tensor | None
    block_size: tuple[int, int]

    @property
    def full(self) -> torch.Tensor:
        """`(query_tiles,)`, how many are visited without a mask."""
        return self.full_count.flatten()

    @property
    def partial(self) -> torch.Tensor:
        """`(query_tiles,)`, how many are visited with one."""
        return self.partial_count.flatten()

    def nbytes(self) -> int:
        """Bytes of device memory; a tensor that repeats itself (stride 0) counts once."""
        held = (self.partial_count, self.partial_idx, self.full_count, self.full_idx, self.cu_tiles, self.cu_entries)
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)


def varlen_bytes(lengths: Lengths, block_m: int, block_n: int) -> int:
    """Bytes that `varlen_lists` will allocate, known without looking at the device."""
    entries = _varlen_entries(lengths, block_m, block_n)
    return 4 * (2 * entries + 2 * count_query_tiles(lengths, block_m) + 2 * (lengths.batch + 1))


def packed_bytes(lengths: Lengths, traits: Traits, block_m: int, block_n: int) -> int:
    """Bytes that `packed_lists` will allocate, known without looking at the device."""
    width = PackedWidth.of(lengths, traits, block_m, block_n)
    tiles = ceil_div(lengths.total_q, block_m)
    return 4 * (tiles * (2 + width.partial) + (width.full if width.full_from_zero else tiles * width.full))


def varlen_lists(
    key_tiles: KeyTiles, tiles: QueryTiles, lengths: Lengths, traits: Traits, block_m: int, block_n: int
) -> BlockLists:
    """The block lists of a batch in the varlen layout."""
    entries = countable_entries(lengths, block_m, block_n)
    stride = (lengths.cu_seqlens_k.long().diff() + block_n - 1) // block_n
    cu_entries = torch.nn.functional.pad((tiles.cu_tiles.long().diff() * stride).cumsum(0), (1, 0))
    local_row = torch.arange(len(tiles.sequence), device=stride.device) - tiles.cu_tiles.take(tiles.sequence)
    address = cu_entries.take(tiles.sequence) + local_row * stride.take(tiles.sequence)
    everything = max(1, ceil_div(lengths.max_seqlen_k, block_n))
    columns = min(_extent_tiles(traits.reach, block_m, block_n), everything) if traits.banded else everything

    def scatter(matrix: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        _assert_fits(used, columns)
        column = torch.arange(columns, device=matrix.device)
        target = torch.where(column < used.unsqueeze(1), address.unsqueeze(1) + column, entries)
        flat = torch.empty(entries + 1, dtype=torch.int32, device=matrix.device)
        return flat.scatter_(0, target.reshape(-1), matrix.reshape(-1)).unsqueeze(0)

    return BlockLists(
        partial_count=key_tiles.partial.unsqueeze(0),
        partial_idx=scatter(key_tiles.partial_matrix(columns), key_tiles.partial),
        full_count=key_tiles.full.unsqueeze(0),
        full_idx=scatter(key_tiles.full_matrix(columns), key_tiles.full),
        cu_tiles=tiles.cu_tiles,
        cu_entries=cu_entries.to(torch.int32),
        block_size=(block_m, block_n),
    )


def packed_lists(key_tiles: KeyTiles, lengths: Lengths, traits: Traits, block_m: int, block_n: int) -> BlockLists:
    """The block lists of a batch as one sequence, in the packed layout. `key_tiles` are cut across sequences."""
    width = PackedWidth.of(lengths, traits, block_m, block_n)
    _assert_fits(key_tiles.partial, width.partial)
    _assert_fits(key_tiles.full, width.full)
    if width.full_from_zero and isinstance(key_tiles, TileRuns):
        from_zero = (key_tiles.full_first * key_tiles.full == 0).all()
        assert_on_device(from_zero, "block lists: a row does not see its first key")
        row = torch.arange(width.full, device=lengths.device, dtype=torch.int32)
        full = row.expand(key_tiles.full.shape[0], -1)
    else:
        full = key_tiles.full_matrix(width.full)
    return BlockLists(
        partial_count=_as_4d(key_tiles.partial),
        partial_idx=_as_4d(key_tiles.partial_matrix(width.partial)),
        full_count=_as_4d(key_tiles.full),
        full_idx=_as_4d(full),
        cu_tiles=None,
        cu_entries=None,
        block_size=(block_m, block_n),
    )


@dataclass(frozen=True)
class PackedWidth:
    """Columns of the packed layout's matrices.

    Attributes:
        partial: of the partial tiles.
        full: of the full ones.
        full_from_zero: all full lists are 0, 1, 2, ... and share one row.
    """

    partial: int
    full: int
    full_from_zero: bool

    @classmethod
    def of(cls, lengths: Lengths, traits: Traits, block_m: int, block_n: int) -> PackedWidth:
        everything = max(1, ceil_div(lengths.total_k, block_n))
        reach = traits.reach
        if not traits.banded:
            return cls(everything, everything, False)
        if lengths.batch == 1 and reach.left is None and reach.right is not None:
            right_edge = ceil_div(block_m + reach.right, block_n) + 1
            return cls(min(right_edge, everything), everything, True)
        extent = _extent_tiles(reach, block_m, block_n)
        per_sequence = ceil_div(lengths.max_seqlen_k, block_n) + 1
        # A query tile that holds rows of two sequences has no full tiles, and lists all between the two.
        if reach.left is not None and (lengths.same or lengths.batch == 1):
            across = extent
        elif lengths.same:
            across = ceil_div(2 * lengths.max_seqlen_k + block_m, block_n) + 1
        else:
            across = everything
        return cls(min(across, everything), min(extent, per_sequence, everything), False)


def countable_entries(lengths: Lengths, block_m: int, block_n: int) -> int:
    """Entries of a varlen index list, which kernels count in int32.

    Raises:
        InputError: they can't.
    """
    entries = _varlen_entries(lengths, block_m, block_n)
    if entries > torch.iinfo(torch.int32).max:
        raise InputError("cu_seqlens_k", "block lists of fewer than 2**31 entries (varlen layout)", entries)
    return entries


def _varlen_entries(lengths: Lengths, block_m: int, block_n: int) -> int:
    """Entries of a varlen index list, an upper bound where the lengths are on the device."""
    if lengths.seqlens_q is not None and lengths.seqlens_k is not None:
        pairs = zip(lengths.seqlens_q, lengths.seqlens_k, strict=True)
        return max(1, sum(ceil_div(rows, block_m) * ceil_div(keys, block_n) for rows, keys in pairs))
    return max(1, count_query_tiles(lengths, block_m) * ceil_div(lengths.max_seqlen_k, block_n))


def _extent_tiles(reach: Reach, block_m: int, block_n: int) -> int:
    """Most key tiles between the first and the last key that `block_m` neighbouring rows can see."""
    if reach.left is None or reach.right is None:
        return int(torch.iinfo(torch.int32).max)
    return ceil_div(block_m + reach.left + reach.right, block_n) + 1


def _assert_fits(count: torch.Tensor, columns: int) -> None:
    """Assert on the device, without synchronising it, that the bounds which the caller and the mask gave are met."""
    assert_on_device(
        (count <= columns).all(), "block lists: longer than max_seqlen_k, max_range and the mask's reach allow"
    )


def _as_4d(per_tile: torch.Tensor) -> torch.Tensor:
    return per_tile.unsqueeze(0).unsqueeze(0)  # one batch entry, all heads alike
