"""packed: the batch presented to FA4 as one sequence, whose borders are just bounds; 4-D block sparsity.

Takes no varlen feature of the build, so it also serves builds that refuse a varlen mask_mod, and its block lists stay
small where the varlen layout's would not (windowed masks and single sequences of any length).
"""

from __future__ import annotations

import torch

from ..blocks import packed_lists
from ..call import CallSpec
from ..fa4.build import Build
from ..fa4.launch import mask_code
from ..intervals import Demand
from ..lengths import as_one_sequence
from ..tiling import classify, query_tiles
from .base import Backend, Work
from .fa4_common import OneCall, choose_tile, masked_refusal


class Packed(Backend):
    name = "packed"
    summary = "one FlashAttention-4 call over the batch as a single sequence, block-sparse"

    def refusal(self, call: CallSpec, demand: Demand, build: Build | None) -> str | None:
        refusal = masked_refusal(call, demand, build)
        if refusal is None and demand.tagged:
            return "a block of tags is per sequence, and the packed batch is a single one"
        if refusal is None and demand.custom:
            return "the mask's own mask_mod counts the rows of its sequence"
        return refusal

    def prepare(self, work: Work) -> OneCall:
        whole, demand = as_one_sequence(work.lengths), work.demand
        tile = choose_tile(work.call, demand, whole.max_seqlen_q)
        bounds = work.bounds.shifted(work.where.key_offset)
        where = work.where._replace(sequence=torch.zeros_like(work.where.sequence))
        tiles = query_tiles(whole, tile.block_m)
        key_tiles = classify(bounds, tiles, whole, where, tile.block_m, tile.n, chained=demand.chained)
        return OneCall(
            build=work.fa4(),
            code=mask_code("packed", bounds),
            tile=tile,
            lists=packed_lists(key_tiles, work.lengths, demand, tile.block_m, tile.n),
            lengths=whole,
            varlen=False,
            key_tiles=key_tiles,
        )
