"""The tiles of one sequence as the block lists have them, for `masks.picture` to draw."""

from __future__ import annotations

import torch

from fa4_prefixlm.batch.lengths import batched
from fa4_prefixlm.batch.ranges import NamedRanges, one_sequence, parse
from fa4_prefixlm.geometry import intervals
from fa4_prefixlm.geometry.tiles import ceil_div, classify, query_tiles
from fa4_prefixlm.geometry.traits import traits
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.picture import DrawnTile


def drawn_tiles(
    mask: Mask,
    *,
    seqlen_k: int,
    tile: tuple[int, int],
    ranges: NamedRanges = None,
    seqlen_q: int | None = None,
) -> list[DrawnTile]:
    """Every tile of a sequence: its box in tokens, and whether a kernel visits it in full, with a mask, or not at all.

    Args:
        mask, seqlen_k, ranges, seqlen_q: as for `masks.picture.mask_image`, which takes the result as `tiles`.
        tile: query rows and keys of a tile.
    """
    tile_m, tile_n = tile
    sizes = batched(1, seqlen_k if seqlen_q is None else seqlen_q, seqlen_k, torch.device("cpu"))
    own = one_sequence(mask, ranges, seqlen_k)
    spans = parse(mask, {name: [pairs] for name, pairs in own.items()}, sizes)
    where = intervals.tokens(sizes)
    bounds, banded = intervals.row_bounds(mask, spans, sizes, where), traits(mask, spans, sizes).banded
    key_tiles = classify(bounds, query_tiles(sizes, tile_m), sizes, where, tile_m, tile_n, banded=banded)
    columns = ceil_div(sizes.total_k, tile_n)
    full, partial = key_tiles.full_matrix(columns).tolist(), key_tiles.partial_matrix(columns).tolist()
    counts = list(zip(key_tiles.full.tolist(), key_tiles.partial.tolist(), strict=True))
    result: list[DrawnTile] = []
    for m in range(ceil_div(sizes.total_q, tile_m)):
        visited_full, visited_partial = set(full[m][: counts[m][0]]), set(partial[m][: counts[m][1]])
        for n in range(columns):
            right, bottom = min((n + 1) * tile_n, sizes.total_k), min((m + 1) * tile_m, sizes.total_q)
            box = (n * tile_n, m * tile_m, right, bottom)
            result.append((box, "full" if n in visited_full else "partial" if n in visited_partial else "skipped"))
    return result
