"""native: one interval a row, run in FA4's own SM90 main loop. No block lists, no mask_mod; reads pages.

Only on builds whose internals are known (`fa4.fingerprint`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..call import CallSpec
from ..fa4 import build as builds
from ..fa4.build import MASKED_ARGUMENTS, Build
from ..fa4.launch import PADDING, Keys
from ..fa4.native_launch import Kernel, native_forward
from ..fa4.tiles import Tile
from ..intervals import Demand
from ..lengths import Lengths
from ..mask import Mask
from ..span_form import span_form
from ..tiling import TileCounts, TileRuns, count_tiles, query_tiles, tile_runs, tile_slots
from .base import Backend, Options, Prepared, Work
from .causal import keys_of
from .fa4_common import build_refusal, choose_tile, kernel_line, outputs, paged_refusal


@dataclass
class NativeCall(Prepared):
    """One launch. bounds, tiles: see `fa4.native.row_intervals`; the tiles are cut with `tokens_of(kernel, ...)`."""

    build: Build
    kernel: Kernel
    bounds: torch.Tensor
    tiles: torch.Tensor
    cu_seqlens_q: torch.Tensor
    keys: Keys
    lengths: Lengths | None = None
    runs: TileRuns | None = None

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
            softmax_scale=options.softmax_scale,
            softcap=options.softcap,
            learnable_sink=options.learnable_sink,
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
        if self.runs is None or self.lengths is None:
            return None
        return count_tiles(self.runs, self.lengths, self.kernel.tokens, self.kernel.tile.n)


class Native(Backend):
    name = "native"
    summary = "FlashAttention-4's SM90 main loop over each row's interval"
    reads_pages = True

    def refusal(self, call: CallSpec, demand: Demand, build: Build | None) -> str | None:
        if demand.custom or demand.tagged or demand.intervals > 1:
            return "it takes masks of one interval a row"
        refusal = build_refusal(call, build, MASKED_ARGUMENTS) or paged_refusal(call, build)
        if refusal is not None or build is None:
            return refusal
        arch = builds.device_arch(call.device)
        if arch // 10 != 9:
            return f"it is made for SM90, not sm_{arch}"
        return build.native_refusal or build.masked_head_dims_refusal(arch, call.head_dim, call.head_dim_v)

    def prepare(self, work: Work) -> NativeCall:
        kernel = native_kernel(work.mask, work.call, work.demand, work.lengths.max_seqlen_q)
        where = query_tiles(work.lengths, kernel.tokens)
        runs = tile_runs(work.bounds, where, kernel.tokens, kernel.tile.n)
        bounds = torch.cat([work.bounds.lo, work.bounds.hi], dim=1)
        return NativeCall(
            build=work.fa4(),
            kernel=kernel,
            bounds=torch.nn.functional.pad(bounds, (0, 0, 0, PADDING)),
            tiles=tile_slots(runs, where, work.lengths, kernel.tokens),
            cu_seqlens_q=work.lengths.cu_seqlens_q,
            keys=keys_of(work),
            lengths=work.lengths,
            runs=runs,
        )


def native_kernel(mask: Mask, call: CallSpec, demand: Demand, max_seqlen_q: int) -> Kernel:
    tile: Tile = choose_tile(call, demand, max_seqlen_q)
    heads = call.heads_q // call.heads_kv
    form = span_form(mask)
    from_key_0 = form is not None and form.outside.begin == form.inside.begin == "keys"
    return Kernel(tile=tile, heads_in_tile=heads if tile.m % heads == 0 else 1, lower=not from_key_0)
