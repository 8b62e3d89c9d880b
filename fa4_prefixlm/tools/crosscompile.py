"""Compile the kernels for a GPU that is not here: `python -m fa4_prefixlm.tools.crosscompile --arch sm_90`.

The public call runs on fake tensors (`FakeTensorMode`), so plan, block lists and launch are the real ones; FA4 compiles
the kernel and does not launch it. One process per architecture: FA4 and the CuTe DSL read theirs from the environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fa4_prefixlm.batch.forward_pass import ForwardPass
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.kernels.target_hardware import target_hardware
from fa4_prefixlm.masks import PrefixLM, causal, key_in, one_block, prefix, window
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.runtime.plans import Plan
from fa4_prefixlm.runtime.plans import plan as make_plan
from fa4_prefixlm.runtime.public_call import attention

TARGETS = {
    "sm_90": {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"},
    "sm_100": {"FLASH_ATTENTION_ARCH": "sm_100", "CUTE_DSL_ARCH": "sm_100a", "FLASH_ATTENTION_NUM_SMS": "148"},
}
# That a kernel compiles is shown by compiling it.
NO_CACHE = {"FA4_PREFIXLM_CACHE": "0", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel: backend, head dims, and the options that change the generated code.

    heads: (query, key) heads. page_size: of keys in pages; None for contiguous ones.
    """

    backend: str
    head_dim: int
    head_dim_v: int
    window: int | None = None
    softcap: float = 0.0
    sink: bool = False
    device_inputs: bool = False
    mask: str = "prefix_lm"
    heads: tuple[int, int] = (4, 2)
    page_size: int | None = None
    dtype: str = "bfloat16"
    backward: str | None = None
    deterministic: bool = False

    @property
    def kernel(self) -> tuple[str, int, bool]:
        """(layout, intervals a row, tagged): which of the `mask_mods` it compiles."""
        return self.backend, {"two": 2, "three": 3, "four": 4}.get(self.mask, 1), self.mask == "block"


def standard_variants(arch: str) -> list[Variant]:
    """What CI proves: every backend that runs there, at the usual head dims, and with every option."""
    native = _native_variants() if arch == "sm_90" else []
    return [*_mask_mod_variants(), *native, *_two_pass_variants(arch), *backward_variants(arch)]


def old_build_variants(arch: str) -> list[Variant]:
    """What CI proves of builds without a varlen mask_mod: the first of two passes, and packed."""
    options = Variant("packed", 128, 128, mask="two", softcap=30.0, sink=True, device_inputs=True)
    wide = [Variant("packed", 256, 256, window=256)] if arch == "sm_90" else []
    return [*_two_pass_variants(arch), Variant("packed", 64, 64), options, *wide]


def _two_pass_variants(arch: str) -> list[Variant]:
    """Its first pass, with each option; SM100 reads pages by TMA at its tile's size."""
    variants = [Variant("two_pass", 128, 128), Variant("two_pass", 128, 128, window=256, page_size=128)]
    options: dict[str, Any] = {"softcap": 30.0, "sink": True, "device_inputs": True}
    variants.append(Variant("two_pass", 128, 128, window=256, page_size=16, **options))
    return [*variants, Variant("two_pass", 256, 256, window=256)] if arch == "sm_90" else variants


def _native_variants() -> list[Variant]:
    """Each way of reading keys (contiguous, pages by TMA and by cp.async), bounds from key 0 on or not, each tile."""
    variants = [
        Variant("native", head_dim, head_dim, window=window, page_size=page_size)
        for head_dim, window, page_size in (
            (64, None, None),
            (128, None, None),
            (128, 256, None),
            (256, None, None),
            (256, 256, None),
            (128, None, 16),
            (128, 256, 128),
            (256, None, 80),
            (256, 256, 16),
            (256, 256, 64),
        )
    ]
    variants.append(Variant("native", 192, 128, page_size=16))
    variants.append(Variant("native", 96, 96, heads=(5, 1)))
    variants.append(Variant("native", 72, 72, heads=(3, 3), dtype="float16"))
    full = Variant("native", 128, 128, window=256, softcap=30.0, sink=True, device_inputs=True, page_size=16)
    return [*variants, full, Variant("causal", 128, 128, page_size=16), Variant("causal", 256, 256, window=256)]


def backward_variants(arch: str) -> list[Variant]:
    """Each tile of the native backward, masking all or skipping full tiles, and each option; the packed one; FA4's."""

    def native(head_dim: int, head_dim_v: int | None = None, **options: Any) -> Variant:
        return Variant("native", head_dim, head_dim_v or head_dim, backward="native", **options)

    ordered: dict[str, Any] = {"deterministic": True}
    packed = [
        Variant("causal", 128, 128, backward="causal"),
        Variant("packed", 128, 128, mask="two", backward="packed"),
        Variant("varlen", 64, 64, mask="block", backward="packed"),
    ]
    if arch != "sm_90":
        return packed
    return [
        *packed,
        native(64),
        native(72, heads=(3, 3)),
        native(96, heads=(4, 4)),
        native(128),
        native(128, window=256, heads=(4, 1), device_inputs=True, **ordered),
        native(128, softcap=30.0),
        native(192),
        native(192, 128, heads=(4, 4), window=256),
        native(256),
        native(256, **ordered),
        native(256, window=256, heads=(4, 4)),
        Variant("varlen", 128, 128, mask="two", backward="native", **ordered),
        Variant("packed", 256, 256, window=256, backward="packed"),
    ]


def _mask_mod_variants() -> list[Variant]:
    variants = [
        Variant(backend, head_dim, head_dim)
        for backend, head_dim in itertools.product(("varlen", "packed"), (64, 128, 256))
    ]
    variants.append(Variant("varlen", 192, 128))
    variants += [Variant(backend, 128, 128, mask=mask) for backend in ("varlen", "packed") for mask in ("two", "four")]
    variants += [Variant("varlen", 64, 64, mask="three"), Variant("packed", 64, 64, mask="three")]
    variants.append(Variant("varlen", 256, 256, mask="block"))
    variants.append(Variant("packed", 128, 128, window=256, softcap=30.0, sink=True, device_inputs=True))
    variants.append(Variant("varlen", 256, 256, window=256, softcap=30.0, sink=True, device_inputs=True))
    variants.append(Variant("varlen", 128, 128, page_size=16))  # keys gathered from pages
    return variants


def compile_variant(variant: Variant, build: str | None = None) -> str:
    """Compile in this process, whose environment must name the target already. Returns the plan's kernel line.

    build: the FA4 to compile, the package it is imported as; None: the one that `plan` would take.
    """
    with target_hardware(build or "flash_attn.cute"), FakeTensorMode():
        cu: object = [0, 700, 1300]
        ranges: object = [[(4, 260)], [(0, 256), (300, 556)]]
        if variant.device_inputs:
            cu = torch.empty(3, dtype=torch.int32, device="cuda")
            ranges = torch.empty(2, 4, 2, dtype=torch.int32, device="cuda")
        if variant.mask == "block":  # more spans than intervals fit, so that the block runs by tags
            ranges = [[(at, at + 10) for at in range(0, 100, 20)], []]
        if variant.backend == "causal":
            ranges = [[], []]
        dtype, (heads_q, heads_kv) = getattr(torch, variant.dtype), variant.heads
        rows = (1300,) if variant.page_size is None else (200, variant.page_size)
        q = torch.empty(1300, heads_q, variant.head_dim, dtype=dtype, device="cuda")
        k = torch.empty(*rows, heads_kv, variant.head_dim, dtype=dtype, device="cuda")
        v = torch.empty(*rows, heads_kv, variant.head_dim_v, dtype=dtype, device="cuda")
        sink = torch.empty(heads_q, dtype=torch.float32, device="cuda") if variant.sink else None
        keys: dict[str, object] = {"cu_seqlens_k": cu}
        if variant.page_size is not None:
            used = torch.empty(2, dtype=torch.int32, device="cuda") if variant.device_inputs else [700, 600]
            keys = {"seqused_k": used, "page_table": torch.empty(2, 100, dtype=torch.int32, device="cuda")}
        plan = make_plan(
            ranges,  # type: ignore[arg-type]
            cu_seqlens_q=cu,  # type: ignore[arg-type]
            mask=_mask(variant),
            like=(q, k, v),
            backend=variant.backend,
            backward=variant.backward or "auto",
            build=build,
            **keys,  # type: ignore[arg-type]
        )
        if variant.backward is None:
            attention(q, k, v, plan, softcap=variant.softcap, learnable_sink=sink)
        else:
            _compile_backward(plan, q, k, v, variant)
            arch = os.environ["FLASH_ATTENTION_ARCH"]
            return f"{plan.build}, {arch}, {plan.gradients(variant.deterministic).describe()}"
    return dict(plan.prepared.describe())["kernel"]


def _compile_backward(plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> None:
    """The backward alone, as if the forward had run."""
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    options = Options(q.shape[-1] ** -0.5, variant.softcap)
    gradients = plan.gradients(variant.deterministic)
    gradients.run(ForwardPass(q, k, v, out, lse), out, lse if variant.softcap else None, options)


def _mask(variant: Variant) -> Mask:
    """A mask that needs the variant's kernel, its spans named "image"."""
    masks = {
        "prefix_lm": PrefixLM(variant.window),
        "two": causal & (prefix("image") | window(100)),
        "three": causal & (window(100) | key_in("image")),
        "four": causal & (window(100) | key_in("image") | prefix("image")),
        "block": causal | one_block("image"),
    }
    return masks[variant.mask]


def compile_in_subprocess(
    arch: str,
    variants: list[Variant],
    *,
    build: str | None = None,
    environment: Mapping[str, str] = os.environ,
    python: str = sys.executable,
    done: Callable[[dict[str, Any]], None] = lambda report: None,
) -> list[dict[str, Any]]:
    """Compile for `arch` ("sm_90", "sm_100") in a fresh process: a report per variant, "error" None if it compiled.

    build: as for `compile_variant`. environment, python: of the process, where the build is not this process's own.
    done: called with each report as it comes. Raises `RuntimeError` if the process died.
    """
    command = [python, "-m", "fa4_prefixlm.tools.crosscompile", "--arch", arch, "--variants", "-"]
    command += ["--build", build] if build is not None else []
    specs = json.dumps([dataclasses.asdict(variant) for variant in variants])
    said, reports = [], []
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+", errors="replace") as errors:
        given.write(specs)
        given.seek(0)
        process = subprocess.Popen(
            command,
            env={**environment, **TARGETS[arch], **NO_CACHE},
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                if line.startswith("{"):
                    reports.append(json.loads(line))
                    done(reports[-1])
        if len(reports) != len(variants):
            errors.seek(0)
            raise RuntimeError(f"cross-compiling for {arch} died:\n{''.join(said)}\n{errors.read()}")
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=TARGETS, required=True)
    parser.add_argument("--variants", metavar="-", help="read variants as JSON from standard input")
    parser.add_argument("--build", metavar="MODULE", help="the FA4 to compile, as it is imported")
    arguments = parser.parse_args()
    os.environ.update(TARGETS[arguments.arch])
    os.environ.update(NO_CACHE)
    variants = (
        [Variant(**spec) for spec in json.load(sys.stdin)] if arguments.variants else standard_variants(arguments.arch)
    )
    failed = False
    for variant in variants:
        began, error, kernel = time.monotonic(), None, None
        try:
            try:
                kernel = compile_variant(variant, arguments.build)
            except Exception:
                # Without a driver, nvidia-cutlass-dsl 4.4 fails the first compile of a process and no other.
                kernel = compile_variant(variant, arguments.build)
        except Exception as exception:
            error = f"{type(exception).__name__}: {exception}"
            failed = True
        report = {**dataclasses.asdict(variant), "arch": arguments.arch, "kernel": kernel, "error": error}
        print(json.dumps({**report, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    sys.exit(1 if failed and not arguments.variants else 0)


if __name__ == "__main__":
    main()
