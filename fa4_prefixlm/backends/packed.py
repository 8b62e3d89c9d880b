"""packed: the batch presented to FA4 as one sequence, whose borders are just bounds; 4-D block sparsity.

Takes no varlen feature of the build, so it also serves builds that refuse a varlen mask_mod, and its block lists stay
small where the varlen layout's would not (windowed masks and single sequences of any length).
"""

from __future__ import annotations

from .. import blocks
from ..call import CallSpec
from ..fa4.launch import bounds_tensor
from ..lengths import Lengths, as_one_sequence
from .base import Backend, Work
from .fa4_common import OneCall, choose_tile, common_refusal, installed_build


class Packed(Backend):
    name = "packed"
    summary = "one FlashAttention-4 call over the batch as a single sequence, block-sparse"

    def refusal(self, call: CallSpec, lengths: Lengths) -> str | None:
        return common_refusal(call)

    def prepare(self, work: Work) -> OneCall:
        whole = as_one_sequence(work.lengths)
        tile = choose_tile(work.call, work.mask, work.lengths, whole.max_seqlen_q)
        reach = work.mask.reach(work.spans.longest)
        bounds = work.bounds.shifted(work.where.key_offset)
        runs = blocks.tile_runs(bounds, blocks.query_tiles(whole, tile.block_m), tile.block_m, tile.n)
        return OneCall(
            build=installed_build(),
            mask_mod="packed",
            tile=tile,
            bounds=bounds_tensor(bounds),
            lists=blocks.packed_lists(runs, work.lengths, reach, tile.block_m, tile.n),
            lengths=whole,
            varlen=False,
            runs=runs,
        )
