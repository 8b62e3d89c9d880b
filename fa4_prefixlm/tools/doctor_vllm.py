"""What `fa4-prefixlm doctor` says of vLLM: whether it will find the backends, and what they will take.

Nothing of vLLM is imported.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry.traits import traits_of_any
from fa4_prefixlm.integrations.vllm import layer_mask, refusals, register
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.runtime.serving_plans import choose_in_place
from fa4_prefixlm.testing.tables import columns, titled

GROUP, PLUGIN = "vllm.general_plugins", "fa4_prefixlm"
# Layers by what a plan differs by; vLLM's blocks have 16 tokens or more.
LAYERS: Mapping[str, tuple[Mask, int]] = {
    f"{kind}, head dim {head_dim}": (mask, head_dim)
    for head_dim in (128, 256, 512)
    for kind, mask in (("local", layer_mask(1024, clamp=False)), ("global", layer_mask(None, clamp=False)))
} | {"global without spans (Gemma 4), head dim 512": (layer_mask(None, clamp=True, prefix_lm=False), 512)}
BLOCK_SIZE = 16


@dataclasses.dataclass(frozen=True)
class VLLM:
    """What there is of vLLM.

    version: None if it is not installed. trouble: why vLLM will not find the backends, None if it will. build: the FA4
    that they run on, None if there is none. takes: by architecture and layer, the backend or why it is refused, where
    there is a build.
    """

    version: str | None
    trouble: str | None
    build: str | None
    takes: Mapping[str, Mapping[str, str]]

    def verdict(self) -> str:
        """One sentence."""
        if self.version is None:
            return "not installed"
        if self.trouble is not None:
            return f"vLLM {self.version} will not find {_names()}: {self.trouble}"
        if self.build is None:
            return f"vLLM {self.version} will find {_names()}, which refuse every layer: there is no FlashAttention-4"
        return f"vLLM {self.version} will find {_names()}, which run on {self.build}"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"verdict": self.verdict(), **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = [self.verdict()]
        if self.takes:
            archs = list(self.takes)
            rows = [[name, *(self.takes[arch][name] for arch in archs)] for name in self.takes[archs[0]]]
            lines += columns([["layers", *archs], *rows])
        return titled("vLLM", lines)


def examine(archs: Mapping[str, int]) -> VLLM:
    """Look at the vLLM of this environment.

    Args:
        archs: GPUs by name, and their compute capabilities: {"sm_90": 90}.
    """
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return VLLM(None, None, None, {})
    found = any(own.name == PLUGIN for own in importlib.metadata.entry_points(group=GROUP))
    trouble = register.unsupported(version)
    if trouble is None and not found:
        trouble = f"the entry point {PLUGIN} of {GROUP} is not installed: pip install this package again"
    build = refusals.fa4()
    takes = {} if build is None else {arch: dict(_takes(number, build)) for arch, number in archs.items()}
    return VLLM(version, trouble, build.name if build is not None else None, takes)


def _takes(arch: int, build: Build) -> Iterable[tuple[str, str]]:
    for name, (mask, head_dim) in LAYERS.items():
        refusal = refusals.of_kernels(head_dim, arch)
        yield name, f"refused: {refusal}" if refusal is not None else _backend(mask, head_dim, arch, build)


def _backend(mask: Mask, head_dim: int, arch: int, build: Build) -> str:
    spec = CallSpec(
        batched=False,
        shape_q=(8192,),
        shape_k=(1024, BLOCK_SIZE),
        heads_q=16,
        heads_kv=8,
        head_dim=head_dim,
        head_dim_v=head_dim,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        needs_grad=False,
        arch=arch,
        page_size=BLOCK_SIZE,
    )
    names = mask.names
    choice = choose_in_place(spec, traits_of_any(mask, dict.fromkeys(names, 256), dict.fromkeys(names, 4)), build)
    return "a new plan every step, no CUDA graphs" if choice is None else f"{choice.name}, in CUDA graphs too"


def _names() -> str:
    names: Sequence[str] = list(register.BACKENDS)
    return " and ".join(names)
