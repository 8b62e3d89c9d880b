"""Which tile the native backward takes, and where a CTA takes all query heads of its key head."""

from __future__ import annotations

import types

import pytest

from fa4_prefixlm.backends.native_backward import folded
from fa4_prefixlm.fa4.kernels.backward_tiles import MANY_KEY_TILES, native_tile


def test_sums_without_an_order_are_not_deterministic() -> None:
    for windowed in (False, True):
        assert native_tile(256, 256, windowed=windowed).step == "256"
        assert native_tile(256, 256, windowed=windowed, deterministic=True).step == "fa4"
        assert native_tile(256, 128, windowed=windowed).step == "fa4"


@pytest.mark.parametrize(
    ("heads", "total_k", "fold"),
    [
        ((16, 8), 80 * MANY_KEY_TILES // 8, True),
        ((16, 8), 80 * MANY_KEY_TILES // 8 - 1, False),
        ((8, 8), 80 * MANY_KEY_TILES, False),
        ((8, 1), 80 * MANY_KEY_TILES, True),
    ],
)
def test_query_heads_are_folded_where_enough_ctas_are_left(heads: tuple[int, int], total_k: int, fold: bool) -> None:
    spec = types.SimpleNamespace(heads_q=heads[0], heads_kv=heads[1])
    lengths = types.SimpleNamespace(total_k=total_k)
    for head_dim in (64, 96, 128, 256):
        tile = native_tile(head_dim, head_dim, windowed=True)
        keys = types.SimpleNamespace(total_k=total_k * tile.n // 80)
        assert folded(tile, spec, keys).fold == fold
        ordered = native_tile(head_dim, head_dim, windowed=True, deterministic=True)
        assert not folded(ordered, spec, keys).fold
    assert not folded(native_tile(192, 128, windowed=True), spec, lengths).fold
