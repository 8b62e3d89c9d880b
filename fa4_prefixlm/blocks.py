"""Bounds -> which key tiles a query tile visits, and which of them need no mask.

Per query tile the minimum and maximum of `lo` and of `hi` over its rows say everything (`TileRuns`): O(tokens) work,
no mask evaluation, no synchronisation. The lists FlashAttention-4 reads are then written in one of its two layouts:

- varlen: row `m` of sequence `b` begins at `cu_block_idx_offsets[b] + m * ceil(seqlen_k / tile_n)`. The kernel fixes
  that stride, so memory grows with `sum(seqlen_q * seqlen_k) / (tile_m * tile_n)`, whatever the mask; only the listed
  entries are ever written.
- packed: a matrix with as many columns as the longest list can have (`PackedWidth`). Windowed masks, and a single
  sequence whose rows all see key 0, need a number of columns that does not depend on the sequence's length: linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import InputError
from .intervals import EMPTY_LO, Bounds
from .lengths import Lengths
from .mask import Reach


@dataclass(frozen=True)
class TileRuns:
    """Key tiles of each query tile, int32 `(query_tiles,)` each: `[first, full_first)` partial, `[full_first,
    full_end)` full, `[full_end, end)` partial.

    Every tile outside `[first, end)` is invisible to all rows of the query tile, every full tile visible to all of
    them. A partial tile may be invisible only where two rows of the query tile see intervals with a gap between them.
    """

    first: torch.Tensor
    full_first: torch.Tensor
    full_end: torch.Tensor
    end: torch.Tensor

    @property
    def full(self) -> torch.Tensor:
        return self.full_end - self.full_first

    @property
    def partial(self) -> torch.Tensor:
        return self.end - self.first - self.full


class TileCounts(NamedTuple):
    """(query tile, key tile) pairs of one head: visited without a mask, visited with one, and not visited."""

    full: int
    partial: int
    skipped: int


@dataclass(frozen=True)
class QueryTiles:
    """Rows `[row_start, row_end)` of each query tile in the packed queries, int64 `(query_tiles,)`.

    cu_tiles: `(batch + 1,)` int32, first tile of each sequence. Tiles past `cu_tiles[-1]` are empty.
    """

    row_start: torch.Tensor
    row_end: torch.Tensor
    cu_tiles: torch.Tensor
    sequence: torch.Tensor


@dataclass(frozen=True)
class BlockLists:
    """FlashAttention-4's block-sparse tensors, int32 on the device. `partial_*` is upstream's `mask_block_*`.

    varlen: counts `(1, query_tiles)`, indices `(1, entries)`, with both `cu_*` `(batch + 1,)`.
    packed: counts `(1, 1, query_tiles)`, indices `(1, 1, query_tiles, columns)`.
    The key tiles of query tile `m` are `idx[m, :count[m]]`, ascending.
    """

    partial_count: torch.Tensor
    partial_idx: torch.Tensor
    full_count: torch.Tensor
    full_idx: torch.Tensor
    cu_tiles: torch.Tensor | None
    cu_entries: torch.Tensor | None
    block_size: tuple[int, int]

    def nbytes(self) -> int:
        """Bytes of device memory; a tensor that repeats itself (stride 0) counts once."""
        held = (self.partial_count, self.partial_idx, self.full_count, self.full_idx, self.cu_tiles, self.cu_entries)
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def query_tiles(lengths: Lengths, block_m: int) -> QueryTiles:
    """Cut each sequence's queries into tiles of `block_m` rows."""
    if lengths.seqlens_q is not None:
        count = sum(ceil_div(rows, block_m) for rows in lengths.seqlens_q)
    else:
        count = lengths.total_q // block_m + lengths.batch  # the most there can be
    cu_q = lengths.cu_seqlens_q.long()
    per_sequence = (cu_q.diff() + block_m - 1) // block_m
    cu_tiles = torch.nn.functional.pad(per_sequence.cumsum(0), (1, 0))
    tile = torch.arange(count, device=lengths.device)
    sequence = torch.searchsorted(cu_tiles.narrow(0, 1, lengths.batch), tile, right=True)
    valid = sequence < lengths.batch
    sequence = sequence.clamp(max=lengths.batch - 1)
    row_start = cu_q.take(sequence) + (tile - cu_tiles.take(sequence)) * block_m
    row_end = torch.minimum(row_start + block_m, cu_q.take(sequence + 1))
    return QueryTiles(
        torch.where(valid, row_start, 0), torch.where(valid, row_end, 0), cu_tiles.to(torch.int32), sequence
    )


def tile_runs(bounds: Bounds, tiles: QueryTiles, block_m: int, block_n: int) -> TileRuns:
    """Classify the key tiles of every query tile from the extremes of its rows' bounds."""
    row = tiles.row_start.unsqueeze(1) + torch.arange(block_m, device=tiles.row_start.device)
    outside = row >= tiles.row_end.unsqueeze(1)
    row = row.clamp(max=max(bounds.lo.shape[0] - 1, 0))
    lo, hi = bounds.lo.take(row), bounds.hi.take(row)
    lo_min = lo.masked_fill(outside, EMPTY_LO).amin(1)
    lo_max = lo.masked_fill(outside, 0).amax(1)
    hi_min = hi.masked_fill(outside, EMPTY_LO).amin(1)
    hi_max = hi.masked_fill(outside, 0).amax(1)
    blind = lo_min >= hi_max  # no row sees anything
    first = (lo_min // block_n).masked_fill(blind, 0)
    end = _ceil_div(hi_max, block_n).masked_fill(blind, 0)
    full_first = torch.minimum(_ceil_div(lo_max, block_n), end)
    full_end = torch.minimum(hi_min // block_n, end)
    none = full_end <= full_first
    return TileRuns(first, torch.where(none, end, full_first), torch.where(none, end, full_end), end)


def count_tiles(runs: TileRuns, lengths: Lengths, block_m: int, block_n: int) -> TileCounts:
    """What `runs` visits and skips. Synchronises."""
    full, partial = int(runs.full.sum()), int(runs.partial.sum())
    pairs = zip(*lengths.on_host(), strict=True)
    everything = sum(ceil_div(rows, block_m) * ceil_div(keys, block_n) for rows, keys in pairs)
    return TileCounts(full, partial, everything - full - partial)


def varlen_bytes(lengths: Lengths, block_m: int, block_n: int) -> int:
    """Bytes that `varlen_lists` will allocate, known without looking at the device."""
    tiles, entries = _varlen_size(lengths, block_m, block_n)
    return 4 * (2 * entries + 2 * tiles + 2 * (lengths.batch + 1))


def packed_bytes(lengths: Lengths, reach: Reach, block_m: int, block_n: int) -> int:
    """Bytes that `packed_lists` will allocate, known without looking at the device."""
    width = PackedWidth.of(lengths, reach, block_m, block_n)
    tiles = ceil_div(lengths.total_q, block_m)
    return 4 * (tiles * (2 + width.partial) + (width.full if width.full_from_zero else tiles * width.full))


def varlen_lists(
    runs: TileRuns, tiles: QueryTiles, lengths: Lengths, reach: Reach, block_m: int, block_n: int
) -> BlockLists:
    count, entries = _varlen_size(lengths, block_m, block_n)
    if entries > torch.iinfo(torch.int32).max:
        raise InputError("cu_seqlens_k", "block lists of fewer than 2**31 entries (varlen layout)", entries)
    stride = (lengths.cu_seqlens_k.long().diff() + block_n - 1) // block_n
    cu_entries = torch.nn.functional.pad((tiles.cu_tiles.long().diff() * stride).cumsum(0), (1, 0))
    local_row = torch.arange(count, device=stride.device) - tiles.cu_tiles.take(tiles.sequence)
    address = cu_entries.take(tiles.sequence) + local_row * stride.take(tiles.sequence)
    columns = min(_extent_tiles(reach, block_m, block_n), ceil_div(lengths.max_seqlen_k, block_n))

    def scatter(matrix: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        column = torch.arange(matrix.shape[1], device=matrix.device)
        target = torch.where(column < used.unsqueeze(1), address.unsqueeze(1) + column, entries)
        flat = torch.empty(entries + 1, dtype=torch.int32, device=matrix.device)
        return flat.scatter_(0, target.reshape(-1), matrix.reshape(-1)).unsqueeze(0)

    return BlockLists(
        partial_count=runs.partial.unsqueeze(0),
        partial_idx=scatter(_partial_matrix(runs, columns), runs.partial),
        full_count=runs.full.unsqueeze(0),
        full_idx=scatter(_full_matrix(runs, columns), runs.full),
        cu_tiles=tiles.cu_tiles,
        cu_entries=cu_entries.to(torch.int32),
        block_size=(block_m, block_n),
    )


def packed_lists(runs: TileRuns, lengths: Lengths, reach: Reach, block_m: int, block_n: int) -> BlockLists:
    width = PackedWidth.of(lengths, reach, block_m, block_n)
    partial = _partial_matrix(runs, width.partial)
    full = _full_matrix(runs, width.full, from_zero=width.full_from_zero)
    return BlockLists(
        partial_count=_as_4d(runs.partial),
        partial_idx=_as_4d(partial),
        full_count=_as_4d(runs.full),
        full_idx=_as_4d(full),
        cu_tiles=None,
        cu_entries=None,
        block_size=(block_m, block_n),
    )


@dataclass(frozen=True)
class PackedWidth:
    """Columns of the packed layout's matrices. full_from_zero: all full lists are 0, 1, 2, ... and share one row."""

    partial: int
    full: int
    full_from_zero: bool

    @classmethod
    def of(cls, lengths: Lengths, reach: Reach, block_m: int, block_n: int) -> PackedWidth:
        everything = max(1, ceil_div(lengths.total_k, block_n))
        if lengths.batch == 1 and reach.left is None:
            right_edge = ceil_div(block_m + reach.right, block_n) + 1
            return cls(min(right_edge, everything), everything, True)
        per_sequence = ceil_div(lengths.max_seqlen_k, block_n) + 1
        # A query tile that holds rows of two sequences has no full tiles, and lists all between the two.
        if reach.left is not None and (lengths.same or lengths.batch == 1):
            across = _extent_tiles(reach, block_m, block_n)
        elif lengths.same:
            across = ceil_div(2 * lengths.max_seqlen_k + block_m, block_n) + 1
        else:
            across = everything
        return cls(
            min(across, everything), min(_extent_tiles(reach, block_m, block_n), per_sequence, everything), False
        )


def _varlen_size(lengths: Lengths, block_m: int, block_n: int) -> tuple[int, int]:
    """(query tiles, list entries), upper bounds where the lengths are on the device."""
    if lengths.seqlens_q is not None and lengths.seqlens_k is not None:
        tiles = [ceil_div(rows, block_m) for rows in lengths.seqlens_q]
        pairs = zip(tiles, lengths.seqlens_k, strict=True)
        return sum(tiles), max(1, sum(rows * ceil_div(keys, block_n) for rows, keys in pairs))
    tiles_bound = lengths.total_q // block_m + lengths.batch
    return tiles_bound, max(1, tiles_bound * ceil_div(lengths.max_seqlen_k, block_n))


def _extent_tiles(reach: Reach, block_m: int, block_n: int) -> int:
    """Most key tiles between the first and the last key that `block_m` neighbouring rows can see."""
    if reach.left is None:
        return int(torch.iinfo(torch.int32).max)
    return ceil_div(block_m + reach.left + reach.right, block_n) + 1


def _partial_matrix(runs: TileRuns, columns: int) -> torch.Tensor:
    """The partial lists as `(query_tiles, columns)`; entries past a row's count hold no meaning."""
    _assert_fits(runs.partial, columns)
    column = torch.arange(columns, device=runs.first.device, dtype=torch.int32)
    before = (runs.full_first - runs.first).unsqueeze(1)
    return column + torch.where(column < before, runs.first.unsqueeze(1), runs.full_end.unsqueeze(1) - before)


def _full_matrix(runs: TileRuns, columns: int, from_zero: bool = False) -> torch.Tensor:
    """The full lists as `(query_tiles, columns)`. from_zero: they all are 0, 1, 2, ..., one row repeated (stride 0)."""
    _assert_fits(runs.full, columns)
    column = torch.arange(columns, device=runs.first.device, dtype=torch.int32)
    if from_zero:
        torch._assert_async((runs.full_first * runs.full == 0).all(), "block lists: a row does not see its first key")
        return column.expand(runs.first.shape[0], -1)
    return column + runs.full_first.unsqueeze(1)


def _assert_fits(count: torch.Tensor, columns: int) -> None:
    """Checked on the device, without synchronising it: a bound that the caller or a mask gave was too small."""
    torch._assert_async(
        (count <= columns).all(), "block lists: longer than max_seqlen_k, max_range and the mask's reach allow"
    )


def _as_4d(per_tile: torch.Tensor) -> torch.Tensor:
    return per_tile.unsqueeze(0).unsqueeze(0)  # one batch entry, all heads alike


def _ceil_div(values: torch.Tensor, divisor: int) -> torch.Tensor:
    return torch.where(values == EMPTY_LO, EMPTY_LO // divisor, (values + (divisor - 1)) // divisor)
