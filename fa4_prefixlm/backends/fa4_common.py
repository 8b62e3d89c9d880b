"""What the two one-call FA4 backends share: their verdict, their tile, and the launch of a prepared state."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..blocks import BlockLists
from ..call import CallSpec
from ..fa4 import build as builds
from ..fa4.build import CAUSAL_ARGUMENTS, MASKED_ARGUMENTS, PAGED_ARGUMENTS, Build
from ..fa4.launch import MaskCode, masked_forward
from ..fa4.tiles import Tile, forward_tile
from ..intervals import MOST_INTERVALS, Demand, in_words
from ..lengths import Lengths
from ..tiling import KeyTiles, TileCounts, count_tiles
from .base import Options, Prepared

DTYPES = (torch.bfloat16, torch.float16)

# A packed PackGQA tile would cover fewer tokens than its block list does: the same work, more bookkeeping.
PACK_GQA = False


def build_refusal(call: CallSpec, build: Build | None, arguments: frozenset[str]) -> str | None:
    """What stops an FA4 backend that calls the build's forward with these arguments, whatever the mask."""
    if call.device.type != "cuda":
        return f"FA4 needs a GPU, the tensors are on {call.device}"
    if build is None:
        return "flash-attn-4 is not installed"
    lacking = build.lacks(arguments)
    if lacking is not None:
        return lacking
    if call.dtype not in DTYPES:
        return f"FA4 takes bfloat16 and float16, not {call.dtype}"
    if call.needs_grad:
        return "no backward yet: q, k or v requires grad"
    return None


def masked_refusal(call: CallSpec, demand: Demand, build: Build | None) -> str | None:
    """What stops the backends with a mask_mod. First the mask, so that one learns of it without a GPU as well."""
    if demand.intervals > MOST_INTERVALS and not demand.custom:
        return f"a row may see {demand.intervals} intervals of keys, the kernels take {MOST_INTERVALS}"
    refusal = build_refusal(call, build, MASKED_ARGUMENTS)
    if refusal is not None or build is None:
        return refusal
    return build.masked_head_dims_refusal(builds.device_arch(call.device), call.head_dim, call.head_dim_v)


def causal_refusal(call: CallSpec, build: Build | None) -> str | None:
    """What stops the build's own causal call."""
    refusal = build_refusal(call, build, CAUSAL_ARGUMENTS) or paged_refusal(call, build)
    if refusal is not None or build is None:
        return refusal
    return build.head_dims.refusal(builds.device_arch(call.device), call.head_dim, call.head_dim_v)


def paged_refusal(call: CallSpec, build: Build | None) -> str | None:
    """What stops FA4's own reading of pages."""
    if call.page_size is None or build is None:
        return None
    if call.head_dim % 16 or call.head_dim_v % 16:
        return "FA4 reads pages for head dims that are multiples of 16"
    if builds.device_arch(call.device) // 10 == 9 and not build.sm90_pages:
        return f"{build} reads no pages on SM90"
    return build.lacks(PAGED_ARGUMENTS)


def outputs(q: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, lse)` for packed tensors, to be written by a kernel."""
    if out is None:
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


def kernel_line(build: Build, device: torch.device, what: str) -> tuple[str, str]:
    """The `kernel` line of `print(plan)`."""
    arch = builds.device_arch(device)
    return "kernel", f"{build}, sm_{arch}{'' if arch // 10 == 9 else ' (compiled, not run)'}, {what}"


def choose_tile(call: CallSpec, demand: Demand, max_seqlen_q: int) -> Tile:
    arch = builds.device_arch(call.device)
    windowed = demand.chained and demand.reach.left is not None
    if call.page_size not in (None, 64):
        windowed = False  # pages that are no key tile are read row by row: 80 keys at a time were 2 to 3 % faster
    return forward_tile(arch, call.head_dim, call.head_dim_v, windowed=windowed, max_seqlen_q=max_seqlen_q)


@dataclass
class OneCall(Prepared):
    """One launch: a mask_mod with the tensors it reads, and block lists.

    lengths: the sequences as the kernel sees them: the batch's own (varlen), or all of it as one.
    """

    build: Build
    code: MaskCode
    tile: Tile
    lists: BlockLists | None
    lengths: Lengths
    varlen: bool
    key_tiles: KeyTiles
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
            softmax_scale=options.softmax_scale,
            softcap=options.softcap,
            learnable_sink=options.learnable_sink,
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

    def tile_counts(self) -> TileCounts:
        return count_tiles(self.key_tiles, self.lengths, self.tile.block_m, self.tile.n)
