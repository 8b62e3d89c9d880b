"""Key bounds -> which query tiles a key tile visits, and the order in which key tiles may add to a query tile.

The forward's question (`tiles`) with queries and keys exchanged. Nothing synchronises.
"""

from __future__ import annotations

import torch

from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.geometry.key_bounds import KeyBounds, sequence_of
from fa4_prefixlm.geometry.tiles import ceil_div

NEVER = torch.iinfo(torch.int32).max


def row_tiles(keys: KeyBounds, lengths: Lengths, tile_m: int, tile_n: int) -> torch.Tensor:
    """`(slots, 4)` int32 a key tile: first, full_first, full_end, end, in query tiles of its sequence.

    Key tile `n` of sequence `b` has slot `cu_seqlens_k[b] // tile_n + b + n`; no kernel reads any other.
    It visits the query tiles `[first, end)`. All rows of those in `[full_first, full_end)` see all `tile_n` keys.
    """
    sides = _rising_tiles if keys.rising else _any_tiles
    return torch.stack(sides(keys, lengths, tile_m, tile_n), dim=1).to(torch.int32)


def key_tile_ends(bounds: Bounds, lengths: Lengths, tile_m: int, tile_n: int) -> torch.Tensor:
    """`(slots,)` int32 a query tile: one past the last key tile that visits it, for rows that rise.

    Key tile `n` adds to query tile `m` after `ends[m] - 1 - n` others, the later ones. That is how many there are:
    neither `first` nor `end` of `row_tiles` falls from one key tile to the next, so the visitors of `m` are one run;
    and `first[n] <= m` says that the last row of `m` ends after the first key of `n`.
    Query tile `m` of sequence `b` has slot `cu_seqlens_q[b] // tile_m + b + m`.
    """
    _, first_row, own_end = _tile_starts(lengths.cu_seqlens_q, lengths.total_q, tile_m)
    last_row = (torch.minimum(first_row + tile_m, own_end) - 1).clamp(0, max(lengths.total_q - 1, 0))
    return _ceil_div(bounds.hi.squeeze(1).take(last_row), tile_n)


def visitors_before(tiles: torch.Tensor, lengths: Lengths, tile_m: int, tile_n: int) -> torch.Tensor:
    """`(slots, query_tiles)` int32, for any mask: how many later key tiles of its sequence visit the query tile too."""
    at = torch.arange(max(1, ceil_div(lengths.max_seqlen_q, tile_m)), device=tiles.device, dtype=torch.int32)
    visits = ((at >= tiles.narrow(1, 0, 1)) & (at < tiles.narrow(1, 3, 1))).to(torch.int32)
    later = visits.flip(0).cumsum(0, dtype=torch.int32).flip(0)  # with the tile itself, and those of later sequences
    later = torch.nn.functional.pad(later, (0, 0, 0, 1))
    slots = tiles.shape[0]
    first = _first_slots(lengths.cu_seqlens_k, tile_n)
    following = torch.searchsorted(first, torch.arange(slots, device=tiles.device), right=True)
    beyond = first.take(following.clamp(max=lengths.batch)).clamp(max=slots)
    return (later.narrow(0, 0, slots) - visits - later.index_select(0, beyond)).contiguous()


Sides = list[torch.Tensor]


def _rising_tiles(keys: KeyBounds, lengths: Lengths, tile_m: int, tile_n: int) -> Sides:
    """The first and the last key of a tile say everything."""
    sequence, first_key, own_end = _tile_starts(lengths.cu_seqlens_k, lengths.total_k, tile_n)
    most = max(lengths.total_k - 1, 0)
    last_key = (torch.minimum(first_key + tile_n, own_end) - 1).clamp(0, most)
    corners = torch.stack([first_key.clamp(max=most), last_key])
    begin_first, begin_last = keys.begin.take(corners).unbind()
    end_first, end_last = keys.end.take(corners).unbind()
    rows = lengths.cu_seqlens_q.diff().take(sequence)
    # Keys that no row has reached begin after the last row: they visit no tile, not even that row's.
    first = torch.where(begin_first >= rows, _ceil_div(rows, tile_m), begin_first // tile_m)
    last = torch.maximum(first, _ceil_div(end_last, tile_m).masked_fill(first_key >= own_end, 0))
    full_first, full_end = _ceil_div(begin_last, tile_m), end_first // tile_m
    none = (full_end <= full_first) | (first_key + tile_n > own_end)
    return [first, torch.where(none, first, full_first), torch.where(none, first, full_end), last]


def _any_tiles(keys: KeyBounds, lengths: Lengths, tile_m: int, tile_n: int) -> Sides:
    begin, end = keys.begin, keys.end
    device, slots = begin.device, slot_count(lengths.total_k, lengths.batch, tile_n)
    token = torch.arange(lengths.total_k, device=device)
    owner = sequence_of(token, lengths.cu_seqlens_k)
    slot = _first_slots(lengths.cu_seqlens_k, tile_n).take(owner)
    slot = slot + (token - lengths.cu_seqlens_k.long().take(owner)) // tile_n

    def over_keys(values: torch.Tensor, how: str, initial: int) -> torch.Tensor:
        empty = torch.full((slots,), initial, dtype=torch.int32, device=device)
        return empty.scatter_reduce(0, slot, values.to(torch.int32), how)

    seen = begin < end
    end_row = over_keys(end.masked_fill(seen.logical_not(), 0).amax(1), "amax", 0)
    first = over_keys(begin.masked_fill(seen.logical_not(), NEVER).amin(1), "amin", NEVER) // tile_m
    first, last = first.masked_fill(end_row == 0, 0), _ceil_div(end_row, tile_m)
    whole = over_keys(torch.ones_like(slot), "sum", 0) == tile_n
    full_first, full_end = first, first
    for k in range(keys.count):  # the widest run that the k-th intervals of all keys of a tile have in common
        latest = over_keys(begin.masked_fill(seen.logical_not(), NEVER).select(1, k), "amax", 0)
        common_first = torch.where(latest == NEVER, NEVER, _ceil_div(latest.clamp(max=NEVER - tile_m), tile_m))
        common_end = over_keys(end.masked_fill(seen.logical_not(), 0).select(1, k), "amin", NEVER) // tile_m
        wider = whole & (common_end - common_first > full_end - full_first)
        full_first, full_end = torch.where(wider, common_first, full_first), torch.where(wider, common_end, full_end)
    return [first, full_first, full_end, last]


def slot_count(total: int, batch: int, tile: int) -> int:
    """Slots of a batch's tiles, in which those of every sequence begin at `cu_seqlens[b] // tile + b`."""
    return total // tile + batch + 1


def _first_slots(cu_seqlens: torch.Tensor, tile: int) -> torch.Tensor:
    """`(batch + 1,)` int64: the slot of each sequence's first tile."""
    return cu_seqlens.long() // tile + torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device)


def _tile_starts(cu_seqlens: torch.Tensor, total: int, tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each slot, int64: its sequence, the first packed token of its tile, the end of its sequence's tokens."""
    batch = cu_seqlens.shape[0] - 1
    first = _first_slots(cu_seqlens, tile)
    slot = torch.arange(slot_count(total, batch, tile), device=cu_seqlens.device)
    sequence = torch.searchsorted(first.narrow(0, 1, batch), slot, right=True).clamp(max=max(batch - 1, 0))
    offset = cu_seqlens.long()
    return sequence, offset.take(sequence) + (slot - first.take(sequence)) * tile, offset.take(sequence + 1)


def _ceil_div(values: torch.Tensor, divisor: int) -> torch.Tensor:
    return (values + (divisor - 1)) // divisor
