"""Tiles and masks that the kernels which fill rows are tried on."""

from __future__ import annotations

import random

from fa4_prefixlm import Mask, PrefixLM
from fa4_prefixlm.batch.ranges import HostSpans
from fa4_prefixlm.masks import causal, everything, query_in, same_span, window
from fa4_prefixlm.testing.batches import Batch, random_spans

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
    causal & window(30) | same_span("image", before=29),
    causal | same_span("image", before=2**40),
)
# Of two sets, "image" and "canvas".
TWO_SETS = (
    causal | same_span("image") | same_span("canvas"),
    causal & window(20) | same_span("image") | same_span("canvas", before=19),
    window(20, 9) & (causal | same_span("image")) | same_span("canvas", before=40),
    window(9, 3) | query_in("canvas") & causal | same_span("image"),
)


def spans_of(rng: random.Random, batch: Batch, mask: Mask) -> dict[str, HostSpans]:
    """The batch's spans for one set that the mask reads, random ones for another."""
    names = sorted(mask.names, key=lambda name: name != "image")
    return {
        name: batch.spans if index == 0 else tuple(random_spans(rng, keys) for _, keys in batch.seqlens)
        for index, name in enumerate(names)
    }
