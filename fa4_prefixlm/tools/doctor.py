"""`fa4-prefixlm doctor`: what a call takes here and why; the machine, the FA4 builds found, and what each can do.

Everything is read from the builds' source, so it works without a GPU and imports none of them. `--trace` compiles.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fa4_prefixlm.backends.causal import Causal
from fa4_prefixlm.backends.flex import Flex
from fa4_prefixlm.backends.reference import Reference
from fa4_prefixlm.backends.select import Choice, choose
from fa4_prefixlm.backends.two_pass import TwoPass
from fa4_prefixlm.batch import lengths
from fa4_prefixlm.batch.tensors import CallSpec, device_arch
from fa4_prefixlm.errors import InputError, UnsupportedError, install_hint
from fa4_prefixlm.fa4.builds.describe import MASKED_ARGUMENTS, PAGED_ARGUMENTS, Build
from fa4_prefixlm.fa4.builds.locate import GivenBuild, all_installed, given
from fa4_prefixlm.geometry.traits import traits_of_any
from fa4_prefixlm.masks import PrefixLM, causal, one_block, prefix, window
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.testing.machine import describe_machine
from fa4_prefixlm.testing.tables import columns, titled
from fa4_prefixlm.tools import doctor_vllm
from fa4_prefixlm.tools.crosscompile import TARGETS, Variant, compile_in_subprocess
from fa4_prefixlm.tools.output import add_json_argument, check_file, print_report


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of call. spans: the most that a sequence has, each of at most 256 tokens."""

    name: str
    mask: Mask = PrefixLM()  # noqa: RUF009 (an immutable value)
    spans: int = 4
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    page_size: int | None = None

    def choose(self, build: Build | None, arch: int, backend: str = "auto") -> Choice:
        """The choice on a GPU of this architecture. Raises `UnsupportedError` if the named backend does not run it."""
        names = self.mask.names if self.spans else ()
        found = traits_of_any(self.mask, dict.fromkeys(names, 256), dict.fromkeys(names, self.spans))
        tokens = 8192
        spec = CallSpec(
            batched=False,
            shape_q=(tokens,),
            shape_k=(tokens,) if self.page_size is None else (tokens // self.page_size, self.page_size),
            heads_q=16,
            heads_kv=8,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim,
            dtype=self.dtype,
            device=torch.device("cuda"),
            needs_grad=False,
            arch=arch,
            page_size=self.page_size,
        )
        sizes = lengths.batched(1, tokens, tokens, torch.device("cpu"))
        return choose(backend, spec, found, sizes, build)


KINDS = (
    Kind("text only", causal, spans=0),
    Kind("spans"),
    Kind("spans, window 1024", PrefixLM(1024)),
    Kind("spans, head dim 256", head_dim=256),
    Kind("spans, pages of 16", page_size=16),
    Kind("spans, window, pages of 128", PrefixLM(1024), page_size=128),
    Kind("spans, head dim 512", head_dim=512),
    Kind("two intervals a row", causal & (prefix("image") | window(1024)), spans=1),
    Kind("many images, one block", causal | one_block("image"), spans=8),
    Kind("float32", dtype=torch.float32),
)

# Those of which the backward is shown too.
WITH_BACKWARD = ("text only", "spans", "spans, window 1024", "spans, head dim 256", "many images, one block")


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What doctor found.

    machine: what there is, by name. here: the architecture of this machine's GPU ("sm_90"), None without one.
    builds: the FA4s found, the default first.
    takes: by architecture and kind of call, the choice on each build, in the order of `builds`.
    traces: by build, what compiled ("backend: kernel or error"), empty unless it was asked for.
    vllm: whether vLLM will find the backends, and what they will take.
    """

    machine: Mapping[str, str]
    here: str | None
    builds: Sequence[Build]
    takes: Mapping[str, Mapping[str, Sequence[Choice]]]
    traces: Mapping[str, Sequence[str]]
    vllm: doctor_vllm.VLLM

    def verdict(self) -> list[str]:
        """What a normal call takes on this machine, or on the GPU that was named, and why."""
        if not self.builds:
            hint = install_hint("fa4")
            name = Kind("spans").choose(None, _number(self.here)).name if self.here else Reference.name
            return [
                f"Here every call runs `{name}`, because no FlashAttention-4 was found.",
                f"To install it, {hint}",
            ]
        lines = []
        if self.here is None and self.is_about_here:
            lines.append(f"Here every call runs `{Reference.name}`, because torch sees no CUDA GPU.")
        for arch, kinds in self.takes.items():
            where = "Here" if arch == self.here else f"On {arch}"
            lines.append(f"{where}, with {self.builds[0].name}, {_normal(kinds)}.")
        return lines

    @property
    def is_about_here(self) -> bool:
        """No GPU was named but this machine's."""
        return self.here in self.takes or list(self.takes) == list(WITHOUT_GPU)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "verdict": self.verdict(),
            "machine": dict(self.machine),
            "builds": [_as_json(build) for build in self.builds],
            "takes": {
                arch: {
                    kind: {build.name: _choice_as_json(own) for build, own in zip(self.builds, choices, strict=True)}
                    for kind, choices in kinds.items()
                }
                for arch, kinds in self.takes.items()
            },
            "traces": {name: list(lines) for name, lines in self.traces.items()},
            "vllm": self.vllm.as_json(),
        }

    def __str__(self) -> str:
        parts = ["\n".join(self.verdict()), titled("machine", columns(list(self.machine.items())))]
        if not self.builds:
            return "\n\n".join([*parts, str(self.vllm)])
        names = [build.name for build in self.builds]
        facts = [[label, *(fact(build) for build in self.builds)] for label, fact in FACTS.items()]
        parts.append(titled("builds", columns([["", *names], *facts])))
        defects = [
            line
            for build in self.builds
            for own in build.defects
            for line in (f"{build.name}: {own.name}", f"  {own.effect}", f"  {own.workaround}")
        ]
        parts.append(titled("known defects, and what is done about them", defects or ["none"]))
        for arch, kinds in self.takes.items():
            rows = [[kind, *map(_in_short, choices)] for kind, choices in kinds.items()]
            rows += [[f"{kind}, backward", *map(_backward_in_short, kinds[kind])] for kind in WITH_BACKWARD]
            parts.append(titled(f"backend of a call on {arch}", columns([["", *names], *rows])))
        for name, lines in self.traces.items():
            parts.append(titled(f"compiled, not run: {name}", lines))
        parts.append(str(self.vllm))
        return "\n\n".join(parts)


def _normal(kinds: Mapping[str, Sequence[Choice]]) -> str:
    """What calls take on the default build: all of them, or one with spans, and why it is not a faster one."""
    choices = {kind: own[0] for kind, own in kinds.items()}
    normal = choices["spans"]
    reasons = {name: reason for name, reason in normal.passed_over if name != Causal.name}  # it is for text only
    if {own.name for own in choices.values()} in ({Flex.name}, {Reference.name}):
        return f"every call runs `{normal.name}` ({reasons[TwoPass.name]})"
    said = f"a call with spans takes `{normal.name}` ({normal.backend.summary})"
    if not reasons:
        return f"{said}, the first choice"
    return f"{said}. " + "; ".join(f"Not `{name}`: {reason}" for name, reason in reasons.items())


FACTS: dict[str, Callable[[Build], str]] = {
    "imported as": lambda build: build.module,
    "varlen mask_mod": lambda build: _yes(build.varlen_mask and not build.lacks(MASKED_ARGUMENTS)),
    "aux_tensors": lambda build: _yes("aux_tensors" in build.arguments),
    "block lists, fixed length": lambda build: _yes("block_sparse_tensors" in build.arguments),
    "block lists, varlen": lambda build: _yes(build.varlen_lists),
    "paged KV": lambda build: _yes(not build.lacks(PAGED_ARGUMENTS)) + ("" if build.sm90_pages else ", not on SM90"),
    "paged KV with a mask_mod": lambda build: _yes(build.varlen_mask and not build.lacks(PAGED_ARGUMENTS)),
    "backward": lambda build: _yes(bool(build.backward_arguments)),
    "backward, mask_mod": lambda build: _yes("mask_mod" in build.backward_arguments),
    "backward, block lists": lambda build: _backward_lists(build),
    "head dims, SM90": lambda build: ", ".join(
        [f"up to {build.head_dims.sm90}", *(str(pair[0]) for pair in sorted(build.head_dims.sm90_pairs))]
    ),
    "head dims, SM100": lambda build: ", ".join(
        [f"up to {build.head_dims.sm100}", *map(str, sorted(build.head_dims.sm100_pairs))]
    ),
    "head dim 256 masked, SM100": lambda build: _yes(build.head_dims.sm100_masked_256),
    "causal beside a mask_mod": lambda build: build.causal_with_mask,
    "sinks": lambda build: ", ".join(str(dtype).removeprefix("torch.") for dtype in build.sink_dtypes),
    "native backend": lambda build: "no: not run on it" if build.native_refusal else "yes",
    "native backward": lambda build: "no: not run on it" if build.backward_refusal else "yes",
}


# What is shown where there is no GPU.
WITHOUT_GPU = ("sm_90", "sm_100")


def examine(given_builds: Sequence[GivenBuild] = (), archs: Sequence[str] = (), *, trace: bool = False) -> Diagnosis:
    """Look at the builds given, or at all that are installed.

    archs: "sm_90"; without any, this machine's, or those of `WITHOUT_GPU`. Raises `InputError` for what is none.
    """
    numbers = {arch: _number(arch) for arch in archs}
    sources = given_builds or [given(build.module) for build in all_installed()]
    found = [own.describe() for own in sources]
    here = device_arch(torch.device("cuda"))
    if not numbers:
        numbers = {arch: _number(arch) for arch in ([f"sm_{here}"] if here else WITHOUT_GPU)}
    takes = {
        arch: {kind.name: [kind.choose(build, number) for build in found] for kind in KINDS}
        for arch, number in numbers.items()
    }
    traces: dict[str, list[str]] = {}
    if trace:
        for build, own in zip(found, sources, strict=True):
            traces[build.name] = [line for arch in numbers for line in _traced(build, own, arch)]
    vllm = doctor_vllm.examine(numbers)
    return Diagnosis(describe_machine().facts(), f"sm_{here}" if here else None, found, takes, traces, vllm)


def _traced(build: Build, source: GivenBuild, arch: str) -> Iterator[str]:
    """Compile a kernel of each backend that the build offers."""
    if arch not in TARGETS:
        yield f"{arch}: cannot be compiled for, only {', '.join(TARGETS)}"
        return
    variants = []
    for name in ("native", "varlen", "packed", "two_pass"):
        with contextlib.suppress(UnsupportedError):
            Kind("spans").choose(build, _number(arch), name)
            variants.append(Variant(name, 128, 128))
    with tempfile.TemporaryDirectory() as scratch:
        environment = source.environment(Path(scratch))
        for report in compile_in_subprocess(arch, variants, build=build.module, environment=environment):
            yield f"{report['backend']}: {report['error'] or report['kernel']}"


def _number(arch: str) -> int:
    """90 of "sm_90"."""
    found = re.fullmatch(r"sm_(\d{2,3})", arch)
    if found is None:
        raise InputError("--arch", "sm_ and a compute capability, such as sm_90 (Hopper) or sm_100", repr(arch))
    return int(found[1])


def _as_json(build: Build) -> dict[str, Any]:
    return {
        "name": build.name,
        "facts": {label: fact(build) for label, fact in FACTS.items()},
        "native_refusal": build.native_refusal,
        "defects": [dataclasses.asdict(defect) for defect in build.defects],
    }


def _choice_as_json(choice: Choice) -> dict[str, Any]:
    return {
        "backend": choice.name,
        "gathered": choice.gathered,
        "passed_over": dict(choice.passed_over),
        "backward": choice.backward.name,
        "backward_passed_over": dict(choice.backward.passed_over),
    }


def _in_short(choice: Choice) -> str:
    return choice.name + " (keys gathered)" * choice.gathered


def _backward_in_short(choice: Choice) -> str:
    return choice.backward.name or "none"


def _backward_lists(build: Build) -> str:
    if "block_sparse_tensors" not in build.backward_arguments:
        return "no"
    return "fixed length" if build.refuses_varlen_backward_lists else "fixed length; varlen not told by its source"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--build",
        action="append",
        default=[],
        metavar="MODULE_OR_PATH",
        help="look at this FA4 (a module, or a checkout of flash_attn/cute); default: all that are installed",
    )
    parser.add_argument(
        "--arch",
        action="append",
        default=[],
        metavar="ARCH",
        help="as if on such a GPU: sm_90 (Hopper), sm_100 (Blackwell), ...; may be given several times",
    )
    parser.add_argument("--trace", action="store_true", help="compile a kernel of each backend (half a minute a build)")
    add_json_argument(parser)


def main(arguments: argparse.Namespace) -> int:
    try:
        check_file("--json", arguments.json)
        diagnosis = examine([given(text) for text in arguments.build], arguments.arch, trace=arguments.trace)
    except InputError as error:
        print(f"fa4-prefixlm doctor: {error}", file=sys.stderr)
        return 2
    print_report(diagnosis, diagnosis.as_json(), arguments.json)
    return 0
