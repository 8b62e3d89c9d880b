"""Bounds -> which key tiles a query tile visits, and which of them need no mask.

No mask is evaluated, nothing synchronises. There are two ways. Where every row sees one interval around its own
position, the extremes of `lo` and `hi` over the rows of a query tile are enough (`tile_runs`, O(tokens)). For any other
mask the rows' intervals are counted into a map of (query tile, key tile) pairs (`tile_map`, O(tokens + pairs)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.geometry.intervals import Bounds, Tokens
from fa4_prefixlm.masks.interval_lists import EMPTY_LO


class CountedTiles(Protocol):
    """How many key tiles each query tile visits.

    A full tile is visible to all rows of its query tile; a tile that is neither is visible to none.

    Attributes:
        full: int32 `(query_tiles,)`, how many are visited without a mask.
        partial: int32 `(query_tiles,)`, how many are visited with one.
    """

    @property
    def full(self) -> torch.Tensor: ...

    @property
    def partial(self) -> torch.Tensor: ...


class KeyTiles(CountedTiles, Protocol):
    """Key tiles of each query tile."""

    def full_matrix(self, columns: int) -> torch.Tensor:
        """`(query_tiles, columns)` int32: the full key tiles, ascending; entries past a row's count mean nothing."""

    def partial_matrix(self, columns: int) -> torch.Tensor:
        """The same for the partial ones."""


@dataclass(frozen=True)
class TileRuns:
    """Key tiles of each query tile as runs: `[first, full_first)` partial, `[full_first, full_end)` full, `[full_end,
    end)` partial.

    A partial tile may be invisible only where two rows of the query tile see intervals with a gap between them.

    Attributes:
        first, full_first, full_end, end: int32 `(query_tiles,)` each, in key tiles.
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

    def full_matrix(self, columns: int) -> torch.Tensor:
        return _columns(columns, self.first.device) + self.full_first.unsqueeze(1)

    def partial_matrix(self, columns: int) -> torch.Tensor:
        column = _columns(columns, self.first.device)
        before = (self.full_first - self.first).unsqueeze(1)
        return column + torch.where(column < before, self.first.unsqueeze(1), self.full_end.unsqueeze(1) - before)


@dataclass(frozen=True)
class TileMap:
    """Key tiles of each query tile as a map.

    Attributes:
        is_full: bool `(query_tiles, key_tiles)`, the tile is seen by all rows.
        is_partial: the same, it is seen by some rows.
    """

    is_full: torch.Tensor
    is_partial: torch.Tensor

    @property
    def full(self) -> torch.Tensor:
        return self.is_full.sum(1, dtype=torch.int32)

    @property
    def partial(self) -> torch.Tensor:
        return self.is_partial.sum(1, dtype=torch.int32)

    def full_matrix(self, columns: int) -> torch.Tensor:
        return _true_columns(self.is_full, columns)

    def partial_matrix(self, columns: int) -> torch.Tensor:
        return _true_columns(self.is_partial, columns)


class TileCounts(NamedTuple):
    """(query tile, key tile) pairs of one head: visited without a mask, visited with one, and not visited."""

    full: int
    partial: int
    skipped: int


@dataclass(frozen=True)
class QueryTiles:
    """Query tiles of a batch.

    Attributes:
        row_start, row_end: int64 `(query_tiles,)`, the tile's rows `[row_start, row_end)` in the packed queries.
        cu_tiles: int32 `(batch + 1,)`, first tile of each sequence. Tiles past `cu_tiles[-1]` are empty.
        sequence: int64 `(query_tiles,)`, the sequence of the tile's rows.
    """

    row_start: torch.Tensor
    row_end: torch.Tensor
    cu_tiles: torch.Tensor
    sequence: torch.Tensor


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(least: int) -> int:
    """The smallest one that is at least this."""
    return 1 << (least - 1).bit_length()


def count_query_tiles(lengths: Lengths, block_m: int) -> int:
    """How many query tiles there are, or the most there can be where the lengths are on the device."""
    if lengths.seqlens_q is not None:
        return sum(ceil_div(rows, block_m) for rows in lengths.seqlens_q)
    return lengths.total_q // block_m + lengths.batch


def query_tiles(lengths: Lengths, block_m: int) -> QueryTiles:
    """Cut each sequence's queries into tiles of `block_m` rows."""
    cu_q = lengths.cu_seqlens_q.long()
    per_sequence = (cu_q.diff() + block_m - 1) // block_m
    cu_tiles = torch.nn.functional.pad(per_sequence.cumsum(0), (1, 0))
    tile = torch.arange(count_query_tiles(lengths, block_m), device=lengths.device)
    sequence = torch.searchsorted(cu_tiles.narrow(0, 1, lengths.batch), tile, right=True)
    valid = sequence < lengths.batch
    sequence = sequence.clamp(max=lengths.batch - 1)
    row_start = cu_q.take(sequence) + (tile - cu_tiles.take(sequence)) * block_m
    row_end = torch.minimum(row_start + block_m, cu_q.take(sequence + 1))
    return QueryTiles(
        torch.where(valid, row_start, 0), torch.where(valid, row_end, 0), cu_tiles.to(torch.int32), sequence
    )


def tile_runs(bounds: Bounds, tiles: QueryTiles, block_m: int, block_n: int) -> TileRuns:
    """Classify the key tiles of every query tile from the extremes of its rows' bounds, one interval each."""
    row, outside = _rows_of(tiles, block_m, bounds.lo.shape[0])
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
    return TileRuns(first, torch.where(none, first, full_first), torch.where(none, first, full_end), end)


def tile_slots(runs: TileRuns, tiles: QueryTiles, lengths: Lengths, block_m: int) -> torch.Tensor:
    """`(slots, 4)` int32: the runs of each query tile, in a slot that is known from `cu_seqlens_q` alone.

    Tile `m` of sequence `b` has slot `cu_seqlens_q[b] // block_m + b + m`; unused slots are 0.
    """
    four = torch.stack([runs.first, runs.full_first, runs.full_end, runs.end], dim=1).to(torch.int32)
    slots = lengths.total_q // block_m + lengths.batch + 1
    local = torch.arange(len(tiles.sequence), device=four.device) - tiles.cu_tiles.take(tiles.sequence)
    slot = lengths.cu_seqlens_q.take(tiles.sequence) // block_m + tiles.sequence + local
    slot = torch.where(tiles.row_end > tiles.row_start, slot, slots)  # tiles past the batch go to a row of their own
    target = slot.unsqueeze(1).expand(-1, 4)
    return torch.zeros(slots + 1, 4, dtype=torch.int32, device=four.device).scatter(0, target, four).narrow(0, 0, slots)


def tile_map(bounds: Bounds, tiles: QueryTiles, lengths: Lengths, where: Tokens, block_m: int, block_n: int) -> TileMap:
    """Classify every (query tile, key tile) pair by counting the intervals that touch it and those that fill it.

    `where` and `lengths` are those of the sequences as the kernel sees them, and `bounds` count the keys of these.
    """
    sequence = where.sequence.long()
    row_in_sequence = torch.arange(len(sequence), device=sequence.device) - lengths.cu_seqlens_q.take(sequence)
    tile = (tiles.cu_tiles.take(sequence) + row_in_sequence // block_m).unsqueeze(1).expand_as(bounds.lo)
    key_tiles = max(1, ceil_div(lengths.max_seqlen_k, block_n))
    shape = (len(tiles.row_start), key_tiles)
    seen = bounds.lo < bounds.hi
    touched = _coverage(shape, tile, bounds.lo // block_n, _ceil_div(bounds.hi, block_n), seen)
    filled = _coverage(shape, tile, _ceil_div(bounds.lo, block_n), bounds.hi // block_n, seen)
    rows = (tiles.row_end - tiles.row_start).unsqueeze(1)
    visible, full = touched > 0, (filled == rows) & (rows > 0)
    if bounds.tags is not None:
        row_all, row_any = _tagged_rows(bounds.tags.row_tag >= 0, tiles, block_m)
        key_all, key_any = _tagged_keys(bounds.tags.key_tag >= 0, tiles, lengths, block_n, key_tiles)
        visible |= row_any.unsqueeze(1) & key_any
        full |= row_all.unsqueeze(1) & key_all
    return TileMap(full, visible & full.logical_not())


def classify(
    bounds: Bounds, tiles: QueryTiles, lengths: Lengths, where: Tokens, block_m: int, block_n: int, *, banded: bool
) -> KeyTiles:
    """The key tiles of every query tile, by the cheaper way that is exact. banded: see `Traits`."""
    if banded:
        return tile_runs(bounds, tiles, block_m, block_n)
    return tile_map(bounds, tiles, lengths, where, block_m, block_n)


def count_tiles(tiles: CountedTiles, lengths: Lengths, block_m: int, block_n: int) -> TileCounts:
    """How many tiles are visited and skipped. Synchronises."""
    full, partial = int(tiles.full.sum()), int(tiles.partial.sum())
    pairs = zip(*lengths.on_host(), strict=True)
    everything = sum(ceil_div(rows, block_m) * ceil_div(keys, block_n) for rows, keys in pairs)
    return TileCounts(full, partial, everything - full - partial)


def _rows_of(tiles: QueryTiles, block_m: int, total_q: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(query_tiles, block_m)`: the rows of each tile, clamped, and whether they are past its end."""
    row = tiles.row_start.unsqueeze(1) + torch.arange(block_m, device=tiles.row_start.device)
    return row.clamp(max=max(total_q - 1, 0)), row >= tiles.row_end.unsqueeze(1)


def _coverage(
    shape: tuple[int, int], tile: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """`shape`: how many of the runs `[begin, end)`, each of the query tile `tile`, cover each key tile."""
    width = shape[1] + 1
    steps = torch.zeros(shape[0] * width, dtype=torch.int32, device=tile.device)
    one = (seen & (begin < end)).to(torch.int32).flatten()
    for edge, sign in ((begin, 1), (end, -1)):
        # Empty runs add nothing, wherever their edges are.
        address = (tile.long() * width + edge.clamp(0, shape[1])).clamp(max=len(steps) - 1).flatten()
        steps = steps.scatter_add(0, address, one * sign)
    return steps.view(shape[0], width).cumsum(1).narrow(1, 0, shape[1])


def _tagged_rows(tagged: torch.Tensor, tiles: QueryTiles, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    row, outside = _rows_of(tiles, block_m, tagged.shape[0])
    inside = tagged.take(row)
    some = inside & outside.logical_not()
    return (inside | outside).all(1) & some.any(1), some.any(1)


def _tagged_keys(
    tagged: torch.Tensor, tiles: QueryTiles, lengths: Lengths, block_n: int, key_tiles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(query_tiles, key_tiles)`: whether all, and whether any, of a key tile's keys are tagged."""
    before = torch.nn.functional.pad(tagged.long().cumsum(0), (1, 0))
    cu_k = lengths.cu_seqlens_k.long()
    first, last = cu_k.narrow(0, 0, lengths.batch).unsqueeze(1), cu_k.narrow(0, 1, lengths.batch).unsqueeze(1)
    begin = torch.minimum(first + torch.arange(key_tiles, device=cu_k.device) * block_n, last)
    end = torch.minimum(begin + block_n, last)
    count = before.take(end) - before.take(begin)
    return (count == block_n).index_select(0, tiles.sequence), (count > 0).index_select(0, tiles.sequence)


def _true_columns(flags: torch.Tensor, columns: int) -> torch.Tensor:
    order = torch.argsort(flags.logical_not().to(torch.uint8), dim=1, stable=True)
    return order.narrow(1, 0, columns).to(torch.int32)


def _columns(columns: int, device: torch.device) -> torch.Tensor:
    return torch.arange(columns, device=device, dtype=torch.int32)


def _ceil_div(values: torch.Tensor, divisor: int) -> torch.Tensor:
    return torch.where(values == EMPTY_LO, EMPTY_LO // divisor, (values + (divisor - 1)) // divisor)
