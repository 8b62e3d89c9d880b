"""native: one interval a row, run in FA4's own SM90 main loop. No block lists, no mask_mod; reads pages.

Only on builds whose internals are known (`fa4.builds.fingerprint`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import Backend, MaskedBatch, Prepared
from fa4_prefixlm.backends.fa4_verdicts import build_refusal, choose_tile, kernel_line, outputs, paged_refusal
from fa4_prefixlm.backends.rows import kernel_rows
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import MASKED_ARGUMENTS, Build
from fa4_prefixlm.fa4.kernels.native_launch import NativeKernel, native_forward
from fa4_prefixlm.geometry.tiles import TileCounts, TileRuns, count_tiles
from fa4_prefixlm.geometry.traits import Traits


@dataclass
class NativeCall(Prepared):
    """One launch.

    Attributes:
        build: the FA4 whose kernel runs.
        kernel: which variant of it.
        bounds, tiles: see `rows.KernelRows`; query tiles have `kernel.tokens` tokens.
        cu_seqlens_q: `(batch + 1,)` int32 on the device.
        keys: where the keys are.
        lengths: of the sequences; None where they are not known (serving plans).
    """

    build: Build
    kernel: NativeKernel
    bounds: torch.Tensor
    tiles: torch.Tensor
    cu_seqlens_q: torch.Tensor
    keys: Keys
    lengths: Lengths | None = None

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = outputs(q, v, out)
        native_forward(
            q,
            k,
            v,
            out,
            lse,
            build=self.build,
            kernel=self.kernel,
            bounds=self.bounds,
            tiles=self.tiles,
            cu_seqlens_q=self.cu_seqlens_q,
            keys=self.keys,
            options=options,
        )
        return out, lse

    def describe(self) -> list[tuple[str, str]]:
        packed = f", {self.kernel.heads_in_tile} heads in a tile" if self.kernel.heads_in_tile > 1 else ""
        held = (self.bounds.nbytes + self.tiles.nbytes) / 2**20
        return [
            kernel_line(self.build, self.bounds.device, f"tile {self.kernel.tile}{packed}"),
            ("memory", f"bounds and tiles {held:.2f} MiB"),
        ]

    def tile_counts(self) -> TileCounts | None:
        if self.lengths is None:
            return None
        return count_tiles(TileRuns(*self.tiles.unbind(1)), self.lengths, self.kernel.tokens, self.kernel.tile.n)


class Native(Backend):
    name = "native"
    summary = "FlashAttention-4's SM90 main loop over each row's interval"
    reads_pages = True
    reads_kernel_rows = True

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None) -> str | None:
        if traits.custom or traits.tagged or traits.intervals > 1:
            return "it only takes masks of one interval a row"
        refusal = build_refusal(spec, build, MASKED_ARGUMENTS) or paged_refusal(spec, build)
        if refusal is not None or build is None:
            return refusal
        arch = spec.arch
        if arch // 10 != 9:
            return f"it is made for SM90, not sm_{arch}"
        return build.native_refusal or build.masked_head_dims_refusal(arch, spec.head_dim, spec.head_dim_v)

    def prepare(self, batch: MaskedBatch) -> NativeCall:
        kernel = native_kernel(batch.spec, batch.traits, batch.lengths.max_seqlen_q)
        bounds, tiles = kernel_rows(batch, kernel.tokens, kernel.tile.n)
        return NativeCall(
            build=batch.fa4(),
            kernel=kernel,
            bounds=bounds,
            tiles=tiles,
            cu_seqlens_q=batch.lengths.cu_seqlens_q,
            keys=batch.keys,
            lengths=batch.lengths,
        )


def native_kernel(spec: CallSpec, traits: Traits, max_seqlen_q: int) -> NativeKernel:
    tile = choose_tile(spec, traits, max_seqlen_q)
    heads = spec.heads_q // spec.heads_kv
    form = traits.closed_form
    from_key_0 = traits.from_key_0
    if form is not None:
        from_key_0 |= all(edges.begin == "keys" for edges in (form.outside, *(own.edges for own in form.inside)))
    return NativeKernel(tile=tile, heads_in_tile=heads if tile.m % heads == 0 else 1, lower=not from_key_0)
