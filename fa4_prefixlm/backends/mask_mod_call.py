"""The launch that `varlen` and `packed` prepare: one FA4 call with a mask_mod and block lists."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import Prepared
from fa4_prefixlm.backends.fa4_verdicts import kernel_line, outputs
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.fa4.kernels.launch import MaskCode, masked_forward
from fa4_prefixlm.fa4.kernels.tiles import Tile
from fa4_prefixlm.geometry.block_lists import BlockLists
from fa4_prefixlm.geometry.tiles import TileCounts, count_tiles
from fa4_prefixlm.geometry.traits import in_words

# A PackGQA tile would cover fewer tokens than its block list does: the same work with more bookkeeping.
PACK_GQA = False


@dataclass
class MaskModCall(Prepared):
    """One launch.

    Attributes:
        build: the FA4 that makes it.
        code: the mask_mod, with the tensors it reads.
        tile: the forward tile.
        lists: the block lists; None: every key tile is visited.
        lengths: the sequences as the kernel sees them: the batch's own (varlen), or all of it as one.
        varlen: a varlen call; False: one of a single sequence.
        pack_gqa: FA4's PackGQA.
    """

    build: Build
    code: MaskCode
    tile: Tile
    lists: BlockLists | None
    lengths: Lengths
    varlen: bool
    pack_gqa: bool = PACK_GQA

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = outputs(q, v, out)
        tensors = (q, k, v, out, lse) if self.varlen else tuple(tensor.unsqueeze(0) for tensor in (q, k, v, out, lse))
        masked_forward(
            *tensors,
            lengths=self.lengths if self.varlen else None,
            build=self.build,
            code=self.code,
            lists=self.lists,
            tile=self.tile,
            pack_gqa=self.pack_gqa,
            options=options,
        )
        return out, lse

    def describe(self) -> list[tuple[str, str]]:
        lists = self.lists.nbytes() if self.lists is not None else 0
        aux = sum(tensor.nbytes for tensor in self.code.aux_tensors)
        if self.code.own is not None:
            what = "its own mask_mod"
        else:
            what = in_words(self.code.intervals, tagged=len(self.code.aux_tensors) > 1)
        return [
            kernel_line(self.build, self.lengths.device, f"tile {self.tile}, {what}"),
            ("memory", f"mask {aux / 2**20:.2f} MiB, block lists {lists / 2**20:.2f} MiB"),
        ]

    def tile_counts(self) -> TileCounts | None:
        return None if self.lists is None else count_tiles(self.lists, self.lengths, self.tile.block_m, self.tile.n)
