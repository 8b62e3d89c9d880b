"""Tiles and masks that the kernels which fill rows are tried on."""

from __future__ import annotations

from fa4_prefixlm import PrefixLM
from fa4_prefixlm.masks import causal, everything, query_in, same_span, window

TILES = ((128, 128), (64, 80), (42, 64), (128, 112), (192, 64))
MASKS = (
    causal,
    window(33),
    causal | query_in("image"),
    window(20) | same_span("image"),
    PrefixLM(),
    PrefixLM(1),
    PrefixLM(100),
    PrefixLM(17, clamp=False),
    everything,
    window(33, 5),
    window(None, 40) | same_span("image"),
    window(20, 9) & (causal | same_span("image")),
    window(2**40, 2**40) | query_in("image"),
)
