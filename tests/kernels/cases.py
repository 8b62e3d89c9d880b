"""Tiles and masks that kernels which plan are tried on, and what their lists are compared by."""

from __future__ import annotations

import itertools
import random

import torch

from fa4_prefixlm import Mask, PrefixLM
from fa4_prefixlm.batch.ranges import HostSpans
from fa4_prefixlm.geometry.block_lists import BlockLists
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


def same_lists(made: BlockLists, wanted: BlockLists) -> None:
    for name in ("partial", "full"):
        counts, others = (getattr(own, f"{name}_count") for own in (made, wanted))
        assert counts.dtype == others.dtype == torch.int32
        assert torch.equal(counts, others), name
        assert all(map(torch.equal, listed(made, name), listed(wanted, name))), name
    for name in ("cu_tiles", "cu_entries"):
        mine, theirs = getattr(made, name), getattr(wanted, name)
        assert mine is theirs is None or torch.equal(mine, theirs), name
    assert made.block_size == wanted.block_size


def listed(lists: BlockLists, name: str) -> list[torch.Tensor]:
    """The entries of each query tile that count."""
    counts, entries = getattr(lists, f"{name}_count").flatten().tolist(), getattr(lists, f"{name}_idx")
    if lists.cu_tiles is None or lists.cu_entries is None:
        return [row[:count] for row, count in zip(entries[0, 0], counts, strict=True)]
    found = []
    cu_tiles, cu_entries = lists.cu_tiles.tolist(), lists.cu_entries.tolist()
    for (first, end), (begin, stop) in zip(itertools.pairwise(cu_tiles), itertools.pairwise(cu_entries), strict=True):
        for tile in range(first, end):
            at = begin + (tile - first) * ((stop - begin) // (end - first))
            found.append(entries[0, at : at + counts[tile]])
    return found
