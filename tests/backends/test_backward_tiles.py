"""Which tile the native backward takes, and where a CTA takes all query heads of its key head."""

from __future__ import annotations

import dataclasses
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
    assert folded(native_tile(256, 256, windowed=True), spec, lengths).fold == fold
    assert not folded(native_tile(256, 256, windowed=True, deterministic=True), spec, lengths).fold
    assert not folded(native_tile(128, 128, windowed=True), spec, lengths).fold
    switched = dataclasses.replace(native_tile(128, 128, windowed=True), fold_from=0)
    assert folded(switched, spec, lengths).fold == (heads[0] > heads[1])
