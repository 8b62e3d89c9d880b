"""What the FA4 backends share: why a build can't run a call, the tile that it runs with, the outputs it writes."""

from __future__ import annotations

import torch

from fa4_prefixlm.batch.tensors import CallSpec, device_arch
from fa4_prefixlm.fa4.builds.describe import CAUSAL_ARGUMENTS, MASKED_ARGUMENTS, PAGED_ARGUMENTS, Build
from fa4_prefixlm.fa4.builds.head_dims import HeadDims
from fa4_prefixlm.fa4.kernels.tiles import Tile, forward_tile
from fa4_prefixlm.geometry.traits import MOST_INTERVALS, Traits

PAGES_NO_GRADIENT = "keys in pages have no backward on FA4"
DTYPES = (torch.bfloat16, torch.float16)


def build_refusal(spec: CallSpec, build: Build | None, arguments: frozenset[str]) -> str | None:
    """Why the build's forward can't be called with these arguments, whatever the mask; None if it can."""
    if spec.device.type != "cuda":
        return f"FA4 needs a GPU, the tensors are on {spec.device}"
    if build is None:
        return "flash-attn-4 is not installed"
    lacking = build.lacks(arguments)
    if lacking is not None:
        return lacking
    if spec.dtype not in DTYPES:
        return f"FA4 takes bfloat16 and float16, not {spec.dtype}"
    if spec.needs_grad and spec.page_size is not None:
        return f"{PAGES_NO_GRADIENT}, and q, k or v requires grad"
    return None


def backward_call_refusal(spec: CallSpec, build: Build | None, arguments: frozenset[str]) -> str | None:
    """What stops a backward that builds on the build's own, called with these arguments, whatever the mask."""
    if spec.device.type != "cuda":
        return f"FA4 needs a GPU, the tensors are on {spec.device}"
    if build is None:
        return "flash-attn-4 is not installed"
    if spec.dtype not in DTYPES:
        return f"FA4 takes bfloat16 and float16, not {spec.dtype}"
    lacking = build.lacks_backward(arguments)
    if lacking is not None:
        return lacking
    head_dims = spec.head_dim, spec.head_dim_v
    if head_dims[0] != head_dims[1] and (head_dims != (192, 128) or spec.heads_q != spec.heads_kv):
        return "FA4's backward takes equal head dims, or (192, 128) with as many key heads as query heads"
    if spec.arch // 10 == 10 and max(head_dims) > 128:
        return "FA4's backward of these head dims on SM100 has limits that were not tried"
    return HeadDims().refusal(spec.arch, *head_dims) or build.head_dims.refusal(spec.arch, *head_dims)


def own_backward_refusal(spec: CallSpec, build: Build | None, arguments: frozenset[str]) -> str | None:
    """The same of the build's own backward as it stands."""
    refusal = backward_call_refusal(spec, build, arguments)
    if refusal is not None or build is None:
        return refusal
    return build.backward_head_dims_refusal(spec.arch, spec.head_dim, spec.head_dim_v)


def masked_refusal(spec: CallSpec, traits: Traits, build: Build | None) -> str | None:
    """Why a backend with a mask_mod can't run the call. The mask is judged first: that works without a GPU."""
    if traits.intervals > MOST_INTERVALS and not traits.custom:
        return f"a row may see {traits.intervals} intervals of keys, the kernels take {MOST_INTERVALS}"
    refusal = build_refusal(spec, build, MASKED_ARGUMENTS)
    if refusal is not None or build is None:
        return refusal
    return build.masked_head_dims_refusal(spec.arch, spec.head_dim, spec.head_dim_v)


def causal_refusal(spec: CallSpec, build: Build | None) -> str | None:
    """Why the build's own causal call can't be made; None if it can."""
    refusal = build_refusal(spec, build, CAUSAL_ARGUMENTS) or paged_refusal(spec, build)
    if refusal is not None or build is None:
        return refusal
    return build.head_dims.refusal(spec.arch, spec.head_dim, spec.head_dim_v)


def paged_refusal(spec: CallSpec, build: Build | None) -> str | None:
    """Why the build can't read the call's pages; None if it can, or if there are none."""
    if spec.page_size is None or build is None:
        return None
    if spec.head_dim % 16 or spec.head_dim_v % 16:
        return "FA4 reads pages for head dims that are multiples of 16"
    if spec.arch // 10 == 9 and not build.sm90_pages:
        return f"{build} reads no pages on SM90"
    return build.lacks(PAGED_ARGUMENTS)


def outputs(q: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, lse)` for packed tensors, for a kernel to write."""
    if out is None:
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


def kernel_line(build: Build, device: torch.device, what: str) -> tuple[str, str]:
    """The `kernel` line of `print(plan)`."""
    return "kernel", f"{build}, sm_{device_arch(device)}{not_run(device)}, {what}"


def not_run(device: torch.device) -> str:
    """What a plan says of kernels for an architecture on which nobody ran them."""
    return "" if device_arch(device) // 10 == 9 else " (compiled, not run)"


def choose_tile(spec: CallSpec, traits: Traits, max_seqlen_q: int) -> Tile:
    """The forward tile of a call."""
    arch = spec.arch
    windowed = traits.banded and traits.reach.left is not None
    if spec.page_size not in (None, 64):
        windowed = False  # other pages are read row by row, where a key tile of 80 was 2 to 3 % faster
    return forward_tile(arch, spec.head_dim, spec.head_dim_v, windowed=windowed, max_seqlen_q=max_seqlen_q)
