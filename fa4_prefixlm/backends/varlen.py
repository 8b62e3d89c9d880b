"""varlen: one FA4 varlen call, `mask_mod` + `aux_tensors` + varlen block sparsity."""

from __future__ import annotations

from ..blocks import varlen_lists
from ..call import CallSpec
from ..fa4 import build as builds
from ..fa4.build import Build
from ..fa4.launch import MaskCode, mask_code
from ..intervals import Demand
from ..tiling import classify, query_tiles
from .base import Backend, Work
from .fa4_common import OneCall, choose_tile, masked_refusal


class Varlen(Backend):
    name = "varlen"
    summary = "one FlashAttention-4 varlen call, block-sparse"

    def refusal(self, call: CallSpec, demand: Demand, build: Build | None) -> str | None:
        refusal = masked_refusal(call, demand, build)
        if refusal is not None:
            return refusal
        assert build is not None
        if not build.varlen_mask:
            return f"{build} refuses mask_mod with aux_tensors for varlen (4.0.0b13 and later take it)"
        if not build.varlen_lists:
            return f"{build} has no varlen block sparsity"
        if builds.device_arch(call.device) // 10 == 9 and build.sm90_list_stride == "unknown":
            return f"{build}: how its SM90 kernel reads varlen block lists could not be told from its source"
        return None

    def prepare(self, work: Work) -> OneCall:
        lengths, demand = work.lengths, work.demand
        tile = choose_tile(work.call, demand, lengths.max_seqlen_q)
        tiles = query_tiles(lengths, tile.block_m)
        key_tiles = classify(work.bounds, tiles, lengths, work.where, tile.block_m, tile.n, chained=demand.chained)
        own = work.mask.custom_kernel
        return OneCall(
            build=work.fa4(),
            code=MaskCode("varlen", 0, list(own.aux_tensors), own.mask_mod)
            if own
            else mask_code("varlen", work.bounds),
            tile=tile,
            lists=varlen_lists(key_tiles, tiles, lengths, demand, tile.block_m, tile.n),
            lengths=lengths,
            varlen=True,
            key_tiles=key_tiles,
        )
