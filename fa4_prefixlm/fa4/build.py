"""The FlashAttention-4 at hand, described from its own source: no list of versions, and nothing is imported."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
from dataclasses import dataclass
from types import ModuleType

import torch

from .fingerprint import native_refusal
from .tiles import unsupported_head_dim

# Where an FA4 may be, in order of preference, with the distribution that brings it.
MODULES = {"flash_attn.cute": "flash-attn-4", "vllm.vllm_flash_attn.cute": "vllm"}

# Arguments of the build's launch function that this library uses.
LAUNCH_ARGUMENTS = frozenset(
    [
        "q",
        "k",
        "v",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "softmax_scale",
        "causal",
        "softcap",
        "window_size_left",
        "window_size_right",
        "learnable_sink",
        "tile_mn",
        "mma_pv_is_rs",
        "pack_gqa",
        "mask_mod",
        "block_sparse_tensors",
        "return_lse",
        "out",
        "lse",
        "aux_tensors",
    ]
)
VARLEN_LIST_FIELDS = frozenset({"cu_total_m_blocks", "cu_block_idx_offsets", "block_size"})
VARLEN_MASK_REFUSAL = "mask_mod with aux_tensors is not yet supported for varlen"


@dataclass(frozen=True)
class Build:
    """One FA4.

    module: the package it is imported as. name: what to call it, "flash-attn-4 4.0.0b36".
    missing: launch arguments this library needs and the build does not have.
    varlen_mask: varlen calls take a `mask_mod` with `aux_tensors` (upstream: since 4.0.0b13).
    varlen_lists: block-sparse tensors have a varlen layout.
    sm90_list_stride: the row stride with which the SM90 kernel reads varlen block lists, as its source has it:
        "tile" is right, "128" is a defect for any other key tile (seen in 4.0.0b36), "unknown" is not trusted.
    native_refusal: why the native lane is not offered on it; None if its internals are known.
    sm90_head_dim_512: its causal SM90 kernel takes head dim 512 (seen in vLLM's fork; upstream ends at 256).
    """

    module: str
    name: str
    missing: frozenset[str]
    varlen_mask: bool
    varlen_lists: bool
    sm90_list_stride: str
    native_refusal: str | None
    sm90_head_dim_512: bool

    def __str__(self) -> str:
        return self.name

    def head_dim_refusal(self, arch: int, head_dim: int, head_dim_v: int) -> str | None:
        """Why its causal kernel does not take these head dims; None if it does."""
        if arch // 10 == 9 and self.sm90_head_dim_512 and head_dim == head_dim_v == 512:
            return None
        return unsupported_head_dim(arch, head_dim, head_dim_v)

    def part(self, name: str) -> ModuleType:
        """A module of the build, imported."""
        return importlib.import_module(f"{self.module}.{name}")


@functools.cache
def installed(module: str | None = None) -> Build | None:
    """The build imported as `module`, or the first of `MODULES` there is; None if there is none."""
    if module is None:
        return next((build for build in map(installed, MODULES) if build is not None), None)
    package, _, below = module.partition(".")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = pathlib.Path(location, *below.split("."))
        if (folder / "interface.py").is_file():
            return describe(folder, module, f"{MODULES.get(module, module)} {_version(MODULES.get(module, package))}")
    return None


def describe(folder: pathlib.Path, module: str, name: str) -> Build:
    """Read the capabilities of the build whose `cute` package is `folder` from its source."""
    interface = (folder / "interface.py").read_text()
    sparsity = folder / "block_sparsity.py"
    sm90 = folder / "flash_fwd_sm90.py"
    fields = _class_fields(sparsity.read_text(), "BlockSparseTensorsTorch") if sparsity.is_file() else set()
    return Build(
        module=module,
        name=name,
        missing=LAUNCH_ARGUMENTS - _parameters(interface, "_flash_attn_fwd"),
        varlen_mask=VARLEN_MASK_REFUSAL not in interface,
        varlen_lists=fields >= VARLEN_LIST_FIELDS,
        sm90_list_stride=_sm90_list_stride(sm90.read_text()) if sm90.is_file() else "unknown",
        native_refusal=native_refusal(folder, name),
        sm90_head_dim_512="head_dim <= 512" in interface,
    )


def device_arch(device: torch.device) -> int:
    """Compute capability as FA4 counts it, 90 or 100; 0 where there is no such GPU. FLASH_ATTENTION_ARCH overrides."""
    if device.type != "cuda":
        return 0
    override = re.fullmatch(r"(?:sm_?)?(\d+)[af]?", os.environ.get("FLASH_ATTENTION_ARCH", ""), re.IGNORECASE)
    if override:
        return int(override[1])
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _parameters(source: str, function: str) -> set[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    return set()


def _class_fields(source: str, name: str) -> set[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    return set()


def _sm90_list_stride(source: str) -> str:
    """How the SM90 kernel makes `SeqlenInfoQK`: with its `tile_n` ("tile") or with the default of 128 ("128")."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and any(_is_seqlen_create(part) for part in (node.func, *node.args)):
            found.add("tile" if any(keyword.arg == "tile_n" for keyword in node.keywords) else "128")
    return found.pop() if len(found) == 1 else "unknown"


def _is_seqlen_create(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "create"
        and isinstance(node.value, ast.Name)
        and node.value.id == "SeqlenInfoQK"
    )
