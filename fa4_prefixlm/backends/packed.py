"""packed: the batch given to FA4 as one sequence, in which borders between sequences are bounds; 4-D block sparsity.

Needs no varlen feature of the build, so it also serves builds that refuse a varlen mask_mod. Its block lists stay small
where the varlen layout's would not (windowed masks and single sequences of any length).
"""

from __future__ import annotations

import torch

from fa4_prefixlm.backends.base import Backend, MaskedBatch
from fa4_prefixlm.backends.fa4_verdicts import choose_tile, masked_refusal
from fa4_prefixlm.backends.mask_mod_call import MaskModCall
from fa4_prefixlm.batch.lengths import Lengths, as_one_sequence
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.fa4.kernels.launch import mask_code
from fa4_prefixlm.geometry.block_lists import BlockLists, packed_lists
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.geometry.tiles import classify, query_tiles
from fa4_prefixlm.geometry.traits import Traits


class Packed(Backend):
    name = "packed"
    summary = "one FlashAttention-4 call over the batch as a single sequence, block-sparse"

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None) -> str | None:
        refusal = masked_refusal(spec, traits, build)
        if refusal is None and traits.tagged:
            return "tags are per sequence, and the packed batch is a single sequence"
        if refusal is None and traits.custom:
            return "the mask's own mask_mod counts rows by sequence, and the packed batch is a single sequence"
        return refusal

    def prepare(self, batch: MaskedBatch) -> MaskModCall:
        whole, bounds = as_one_sequence(batch.lengths), batch.packed_bounds
        tile = choose_tile(batch.spec, batch.traits, whole.max_seqlen_q)
        return MaskModCall(
            build=batch.fa4(),
            code=mask_code("packed", bounds),
            tile=tile,
            lists=_lists(batch, bounds, whole, tile.block_m, tile.n),
            lengths=whole,
            varlen=False,
        )


def _lists(batch: MaskedBatch, bounds: Bounds, whole: Lengths, tile_m: int, tile_n: int) -> BlockLists:
    """bounds: counting the packed keys."""
    traits = batch.traits
    if batch.on_gpu and not traits.banded:
        from fa4_prefixlm.kernels.tile_lists import packed_tile_lists

        return packed_tile_lists(batch.bounds.lo, batch.bounds.hi, batch.lengths, tile_m, tile_n)
    where = batch.where._replace(sequence=torch.zeros_like(batch.where.sequence))
    tiles = query_tiles(whole, tile_m)
    key_tiles = classify(bounds, tiles, whole, where, tile_m, tile_n, banded=traits.banded)
    return packed_lists(key_tiles, batch.lengths, traits, tile_m, tile_n)
