"""Tiles of all query heads of a key head, in turn: where a layout says that their elements are. No GPU is needed."""

from __future__ import annotations

import pytest

pytest.importorskip("flash_attn", reason="flash-attn-4 is not installed")

import cutlass
from cutlass import cute

from fa4_prefixlm.fa4.kernels.folded_heads import in_turn

HEADS, SIZE, TILES = 3, 8, 5
ROW, KEY_HEAD, HEAD = 1000, 100_000, 1_000_000


@pytest.mark.parametrize("inner", [(), (16,)], ids=["numbers", "rows"])
def test_a_tile_of_each_head_in_turn(inner: tuple[int, ...]) -> None:
    """Of a sequence that begins in row 5 of its tensor, and of key head 1."""
    found: dict[tuple[int, int], int] = {}

    @cute.jit
    def look() -> None:
        plain = cute.make_layout((5 + SIZE * TILES, *inner, 2, HEADS), stride=(ROW, *(1,) * len(inner), KEY_HEAD, HEAD))
        layout = in_turn(cute.make_tensor(0, plain), HEADS, SIZE).layout
        begin = cute.crd2idx(((5, 0, 0), *(0,) * len(inner), 1), layout)
        for tile in cutlass.range_constexpr(TILES * HEADS):
            for row in cutlass.range_constexpr(SIZE):
                found[tile, row] = begin + cute.crd2idx((tile * SIZE + row, *(0,) * len(inner), 0), layout)

    look()
    assert len(found) == TILES * HEADS * SIZE
    for (tile, row), place in found.items():
        assert place == (5 + tile // HEADS * SIZE + row) * ROW + KEY_HEAD + tile % HEADS * HEAD
