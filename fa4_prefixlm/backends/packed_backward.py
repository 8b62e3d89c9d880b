"""packed backward: the batch presented to FA4 as one sequence, whose borders are just bounds; block-sparse, mask_mod.

FA4's varlen backward takes no block lists; that of one sequence does. Blocks of tags are told apart by sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import BackwardBackend, Gradients, MaskedBatch
from fa4_prefixlm.backends.fa4_verdicts import not_run, own_backward_refusal
from fa4_prefixlm.batch.forward_pass import ForwardPass, Grads
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import PACKED_BACKWARD_ARGUMENTS, Build
from fa4_prefixlm.fa4.kernels.backward_launch import packed_backward
from fa4_prefixlm.fa4.kernels.backward_tiles import packed_tile
from fa4_prefixlm.fa4.kernels.launch import MaskCode, mask_code
from fa4_prefixlm.geometry.block_lists import BlockLists
from fa4_prefixlm.geometry.packed_row_tiles import packed_row_lists
from fa4_prefixlm.geometry.traits import MOST_INTERVALS, Traits, in_words


@dataclass(frozen=True)
class PackedGradients(Gradients):
    """lists: of each key tile, the query tiles that see it."""

    build: Build
    code: MaskCode
    lists: BlockLists

    def run(self, forward: ForwardPass, dout: torch.Tensor, dlse: torch.Tensor | None, options: Options) -> Grads:
        return packed_backward(
            forward,
            dout,
            dlse,
            build=self.build,
            code=self.code,
            lists=self.lists,
            options=options,
        )

    def describe(self) -> str:
        block_m, block_n = self.lists.block_size
        held = sum(tensor.nbytes for tensor in self.code.aux_tensors) + self.lists.nbytes()
        words = in_words(self.code.intervals, tagged=len(self.code.aux_tensors) > 1)
        where = not_run(self.code.aux_tensors[0].device)
        return f"tile {block_m}x{block_n}{where}, {words}, {held / 2**20:.2f} MiB"


class PackedBackward(BackwardBackend):
    name = "packed"
    summary = "one FlashAttention-4 backward over the batch as a single sequence, block-sparse"

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None, *, deterministic: bool) -> str | None:
        if traits.custom:
            return "the mask's own mask_mod counts the rows of its sequence"
        if traits.intervals > MOST_INTERVALS:
            return f"a row may see {traits.intervals} intervals of keys, it takes {MOST_INTERVALS}"
        if deterministic:
            return "its order of writes differs from run to run"
        refusal = own_backward_refusal(spec, build, PACKED_BACKWARD_ARGUMENTS)
        if refusal is None and spec.arch // 10 != 9 and max(spec.head_dim, spec.head_dim_v) > 128:
            return "FA4's block-sparse backward takes head dims up to 128 on SM100"
        return refusal

    def prepare(self, batch: MaskedBatch, *, deterministic: bool) -> PackedGradients:
        tile_m, tile_n = packed_tile(batch.spec.arch, batch.spec.head_dim)
        bounds = batch.packed_bounds
        lists = packed_row_lists(bounds, batch.lengths, tile_m, tile_n)
        return PackedGradients(batch.fa4(), mask_code("packed", bounds), lists)
