"""varlen: one FA4 varlen call, `mask_mod` + `aux_tensors` + varlen block sparsity."""

from __future__ import annotations

from fa4_prefixlm.backends.base import Backend, MaskedBatch
from fa4_prefixlm.backends.fa4_verdicts import choose_tile, masked_refusal
from fa4_prefixlm.backends.mask_mod_call import MaskModCall
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.fa4.kernels.launch import MaskCode, mask_code
from fa4_prefixlm.geometry.block_lists import BlockLists, varlen_lists
from fa4_prefixlm.geometry.tiles import classify, query_tiles
from fa4_prefixlm.geometry.traits import Traits


class Varlen(Backend):
    name = "varlen"
    summary = "one FlashAttention-4 varlen call, block-sparse"

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None) -> str | None:
        refusal = masked_refusal(spec, traits, build)
        if refusal is not None:
            return refusal
        assert build is not None
        if not build.varlen_mask:
            return f"{build} refuses mask_mod with aux_tensors for varlen (4.0.0b13 and later take it)"
        if not build.varlen_lists:
            return f"{build} has no varlen block sparsity"
        if spec.arch // 10 == 9 and build.sm90_list_stride == "unknown":
            return f"{build}: how its SM90 kernel reads varlen block lists is not clear from its source"
        return None

    def prepare(self, batch: MaskedBatch) -> MaskModCall:
        lengths, traits = batch.lengths, batch.traits
        tile = choose_tile(batch.spec, traits, lengths.max_seqlen_q)
        own = batch.mask.custom_kernel
        return MaskModCall(
            build=batch.fa4(),
            code=MaskCode("varlen", 0, list(own.aux_tensors), own.mask_mod)
            if own
            else mask_code("varlen", batch.bounds),
            tile=tile,
            lists=_lists(batch, tile.block_m, tile.n),
            lengths=lengths,
            varlen=True,
        )


def _lists(batch: MaskedBatch, tile_m: int, tile_n: int) -> BlockLists:
    bounds, lengths, traits = batch.bounds, batch.lengths, batch.traits
    if batch.on_gpu and not traits.banded and not traits.tagged:
        from fa4_prefixlm.kernels.tile_lists import varlen_tile_lists

        return varlen_tile_lists(bounds.lo, bounds.hi, lengths, tile_m, tile_n)
    tiles = query_tiles(lengths, tile_m)
    key_tiles = classify(bounds, tiles, lengths, batch.where, tile_m, tile_n, banded=traits.banded)
    return varlen_lists(key_tiles, tiles, lengths, traits, tile_m, tile_n)
