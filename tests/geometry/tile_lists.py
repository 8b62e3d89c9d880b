"""Lists of key tiles against a dense mask, by looking at every tile."""

from __future__ import annotations

import torch

from fa4_prefixlm.geometry import tiles as tiling


def tiles_of(visible: torch.Tensor, rows: slice, block_n: int) -> tuple[set[int], set[int]]:
    """(tiles with anything visible, tiles with everything visible) of the rows of one query tile, by looking."""
    part = visible[rows]
    some, every = set(), set()
    for tile in range(tiling.ceil_div(part.shape[1], block_n)):
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
