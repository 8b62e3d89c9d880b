"""varlen: one FA4 varlen call, `mask_mod` + `aux_tensors` + varlen block sparsity."""

from __future__ import annotations

from .. import blocks
from ..call import CallSpec
from ..fa4 import build as builds
from ..fa4.launch import bounds_tensor
from ..lengths import Lengths
from .base import Backend, Work
from .fa4_common import OneCall, choose_tile, common_refusal, installed_build


class Varlen(Backend):
    name = "varlen"
    summary = "one FlashAttention-4 varlen call, block-sparse"

    def refusal(self, call: CallSpec, lengths: Lengths) -> str | None:
        refusal = common_refusal(call)
        if refusal is not None:
            return refusal
        build = installed_build()
        if not build.varlen_mask:
            return f"{build} refuses mask_mod with aux_tensors for varlen (4.0.0b13 and later take it)"
        if not build.varlen_lists:
            return f"{build} has no varlen block sparsity"
        if builds.device_arch(call.device) // 10 == 9 and build.sm90_list_stride == "unknown":
            return f"{build}: how its SM90 kernel reads varlen block lists could not be told from its source"
        return None

    def prepare(self, work: Work) -> OneCall:
        tile = choose_tile(work.call, work.mask, work.lengths, work.lengths.max_seqlen_q)
        reach = work.mask.reach(work.spans.longest)
        tiles = blocks.query_tiles(work.lengths, tile.block_m)
        runs = blocks.tile_runs(work.bounds, tiles, tile.block_m, tile.n)
        return OneCall(
            build=installed_build(),
            mask_mod="varlen",
            tile=tile,
            bounds=bounds_tensor(work.bounds),
            lists=blocks.varlen_lists(runs, tiles, work.lengths, reach, tile.block_m, tile.n),
            lengths=work.lengths,
            varlen=True,
            runs=runs,
        )
