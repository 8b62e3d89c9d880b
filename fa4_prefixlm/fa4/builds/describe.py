"""The FlashAttention-4 at hand, described from its own source: without a list of versions, importing nothing."""

from __future__ import annotations

import importlib
import pathlib
from dataclasses import dataclass
from types import ModuleType

import torch

from fa4_prefixlm.fa4.builds import source
from fa4_prefixlm.fa4.builds.defects import Defect, defects
from fa4_prefixlm.fa4.builds.fingerprint import KNOWN, backward_refusal, native_refusal
from fa4_prefixlm.fa4.builds.head_dims import HeadDims

# Arguments of the build's launch function that this library uses: for a causal call, for keys in pages, for a mask_mod.
CAUSAL_ARGUMENTS = frozenset(
    [
        *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal"),
        *("softcap", "window_size_left", "window_size_right", "learnable_sink", "return_lse", "out"),
    ]
)
PAGED_ARGUMENTS = CAUSAL_ARGUMENTS | {"page_table", "seqused_k"}
MASKED_ARGUMENTS = CAUSAL_ARGUMENTS | {
    *("mask_mod", "aux_tensors", "block_sparse_tensors", "tile_mn", "mma_pv_is_rs", "pack_gqa", "lse")
}
VARLEN_LIST_FIELDS = frozenset({"cu_total_m_blocks", "cu_block_idx_offsets", "block_size"})
# The same of its backward.
BACKWARD_ARGUMENTS = frozenset(
    [
        *("q", "k", "v", "out", "dout", "lse", "softmax_scale", "causal", "softcap", "dlse", "deterministic"),
        *("window_size_left", "window_size_right", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    ]
)
PACKED_BACKWARD_ARGUMENTS = BACKWARD_ARGUMENTS | {"mask_mod", "aux_tensors", "block_sparse_tensors"}
SINK_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Build:
    """One FA4, and what it can do.

    Attributes:
        module: the package it is imported as.
        name: what to call it, such as "flash-attn-4 4.0.0b36".
        arguments: those of its forward launch function.
        backward_arguments: those of its backward launch function; empty if it has none.
        varlen_mask: varlen calls take a `mask_mod` with `aux_tensors` (upstream: since 4.0.0b13).
        varlen_lists: block-sparse tensors have a varlen layout.
        sm90_list_stride: the row stride with which the SM90 kernel reads varlen block lists, as its source has it:
            "tile" is right, "128" is a defect for any other key tile (seen in 4.0.0b36), "unknown" is not trusted.
        native_refusal: why the native backend is not offered on it; None if its internals are known.
        head_dims: which head dims its kernels take.
        sm90_pages: its SM90 kernel reads keys in pages.
        causal_with_mask: what `causal=True` and windows do beside a mask_mod: "ignored", "kept" (then the mask_mod is
            not applied as it stands, seen in vLLM's fork) or "unknown". This library passes neither.
        sink_dtypes: dtypes of attention sinks that it takes. Others are applied to its output.
        refuses_varlen_backward_lists: its varlen backward refuses block lists.
        sm90_backward_head_dims: "wrong" where its SM90 backward and the kernels around it round head dims differently
            (seen in 4.0.0b36), "right", or "unknown".
        backward_refusal: why the native backward is not offered on it; None if its internals are known.
    """

    module: str
    name: str
    arguments: frozenset[str]
    backward_arguments: frozenset[str]
    varlen_mask: bool
    varlen_lists: bool
    sm90_list_stride: str
    native_refusal: str | None
    head_dims: HeadDims
    sm90_pages: bool = True
    causal_with_mask: str = "ignored"
    sink_dtypes: tuple[torch.dtype, ...] = SINK_DTYPES
    refuses_varlen_backward_lists: bool = True
    sm90_backward_head_dims: str = "unknown"
    backward_refusal: str | None = "its backward was not looked at"

    def __str__(self) -> str:
        return self.name

    def lacks(self, arguments: frozenset[str]) -> str | None:
        """Why its forward can't be called with these arguments; None if it can."""
        missing = ", ".join(sorted(arguments - self.arguments))
        return f"the forward of {self} has no argument {missing}" if missing else None

    def lacks_backward(self, arguments: frozenset[str]) -> str | None:
        """Why a backward with these arguments can't be called; None if it can."""
        if not self.backward_arguments:
            return f"{self} has no backward"
        missing = ", ".join(sorted(arguments - self.backward_arguments))
        return f"the backward of {self} has no argument {missing}" if missing else None

    def masked_head_dims_refusal(self, arch: int, head_dim: int, head_dim_v: int) -> str | None:
        """Why its kernels do not take these head dims with a mask_mod; None if they do."""
        if arch // 10 == 10 and head_dim == head_dim_v == 256 and not self.head_dims.sm100_masked_256:
            return f"{self} runs head dim 256 on SM100 by a kernel of its own, without mask_mod"
        # Beyond 256 no tile was ever run with a mask.
        return HeadDims().refusal(arch, head_dim, head_dim_v) or self.head_dims.refusal(arch, head_dim, head_dim_v)

    def backward_head_dims_refusal(self, arch: int, head_dim: int, head_dim_v: int) -> str | None:
        """Why its own backward is wrong, or not known to be right, at these head dims; None if it is right."""
        if arch // 10 != 9 or self.sm90_backward_head_dims == "right":
            return None
        odd = [dim for dim in (head_dim, head_dim_v) if dim <= 128 and 0 < dim % 32 <= 16]
        return f"the SM90 backward of {self} is wrong at head dim {odd[0]}" if odd else None

    @property
    def defects(self) -> tuple[Defect, ...]:
        """The known defects that its source has, and what this library does about each."""
        return defects(
            varlen_lists=self.varlen_lists,
            sm90_list_stride=self.sm90_list_stride,
            causal_with_mask=self.causal_with_mask,
            sinks_in_float32=torch.float32 in self.sink_dtypes,
            block_lists="block_sparse_tensors" in self.arguments,
            sm90_backward_head_dims=self.sm90_backward_head_dims,
        )

    def part(self, name: str) -> ModuleType:
        """A module of the build, imported."""
        return importlib.import_module(f"{self.module}.{name}")


# The build to compare others with, the newest release on which the GPU suite ran: it has all that this library uses.
BEST = Build(
    module="flash_attn.cute",
    name=next(name for name in KNOWN.values() if name.startswith("flash-attn-4")),
    arguments=MASKED_ARGUMENTS | PAGED_ARGUMENTS,
    backward_arguments=PACKED_BACKWARD_ARGUMENTS,
    varlen_mask=True,
    varlen_lists=True,
    sm90_list_stride="tile",
    native_refusal=None,
    head_dims=HeadDims(),
    sm90_backward_head_dims="right",
    backward_refusal=None,
)


def describe(folder: pathlib.Path, module: str, name: str) -> Build:
    """The build whose `cute` package is `folder`, described from its source."""
    interface = (folder / "interface.py").read_text()
    sparsity = folder / "block_sparsity.py"
    sm90 = folder / "flash_fwd_sm90.py"
    fields = source.class_fields(sparsity.read_text(), "BlockSparseTensorsTorch") if sparsity.is_file() else frozenset()
    return Build(
        module=module,
        name=name,
        arguments=source.parameters(interface, "_flash_attn_fwd"),
        backward_arguments=source.parameters(interface, "_flash_attn_bwd"),
        varlen_mask="mask_mod with aux_tensors is not yet supported for varlen" not in interface,
        varlen_lists=fields >= VARLEN_LIST_FIELDS,
        sm90_list_stride=source.sm90_list_stride(sm90.read_text()) if sm90.is_file() else "unknown",
        native_refusal=native_refusal(folder, name),
        head_dims=_head_dims(interface, dedicated_256=(folder / "sm100_hd256_2cta_fmha_forward.py").is_file()),
        sm90_pages="paged KV not supported on SM 9" not in interface,
        causal_with_mask=_causal_with_mask(interface),
        sink_dtypes=(torch.bfloat16,) if "learnable_sink.dtype == torch.bfloat16" in interface else SINK_DTYPES,
        refuses_varlen_backward_lists="Varlen backward with block sparsity is not yet supported" in interface,
        sm90_backward_head_dims=_backward_head_dims(interface, folder / "flash_bwd_sm90.py"),
        backward_refusal=backward_refusal(folder, name),
    )


def _backward_head_dims(interface: str, kernel: pathlib.Path) -> str:
    around = source.assigned_numbers(interface, "hdim_multiple_of")
    within = source.assigned_numbers(kernel.read_text(), "hdim_multiple_of") if kernel.is_file() else frozenset()
    if not around or not within:
        return "unknown"
    return "right" if around == within else "wrong"


def _causal_with_mask(interface: str) -> str:
    try:
        causal, local, *_ = source.run_alone(interface, "_resolve_causal_local_window", True, None, None, object())
    except (source.UnknownError, ValueError):
        return "unknown"
    return "kept" if causal or local else "ignored"


def _head_dims(interface: str, *, dedicated_256: bool) -> HeadDims:
    def takes(capability: int, head_dim: int, head_dim_v: int) -> bool:
        try:
            source.run_alone(interface, "_validate_head_dims", head_dim, head_dim_v, capability, 8)
        except (AssertionError, ValueError, NotImplementedError):
            return False
        return True

    try:
        return HeadDims(
            sm90=max((dim for dim in (64, 128, 192, 256) if takes(9, dim, dim)), default=0),
            sm90_pairs=frozenset({(512, 512)} if takes(9, 512, 512) else ()),
            sm100=max((dim for dim in (64, 128) if takes(10, dim, dim)), default=0),
            sm100_pairs=frozenset(pair for pair in ((192, 128), (256, 256)) if takes(10, *pair)),
            sm100_masked_256=not dedicated_256,
        )
    except source.UnknownError:
        return HeadDims(sm100_masked_256=not dedicated_256)
