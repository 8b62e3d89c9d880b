"""Compile the kernels of a model's attention layers now, so that no user waits for them: into the cache on disk.

For each window of the model: the call for batches with spans, and FA4's own for batches without. On a GPU the calls are
real ones on small tensors, so Triton's cache fills too. With --arch they are compiled for a GPU that is not here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm  # type: ignore[import-untyped]

from fa4_prefixlm.batch.integers import whole_number
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.fa4.kernels import disk_cache
from fa4_prefixlm.fa4.kernels.target_hardware import target_hardware
from fa4_prefixlm.masks.prefix_lm import PrefixLM
from fa4_prefixlm.runtime.plans import plan
from fa4_prefixlm.runtime.public_call import attention
from fa4_prefixlm.runtime.serving_plans import serving_plan
from fa4_prefixlm.tools.crosscompile import TARGETS

TOKENS = 1024
Spans = list[list[tuple[int, int]]]
SPANS: Spans = [[(64, 320)], [(0, 200), (300, 556)]]
NO_SPANS: Spans = [[], []]


@dataclass(frozen=True)
class Shape:
    """A model's attention layers, as far as kernels differ by them.

    windows: sliding windows in tokens, None for layers without. page_size: of the key cache; None: keys are contiguous.
    """

    head_dim: int
    head_dim_v: int
    heads: int
    kv_heads: int
    dtype: str
    windows: tuple[int | None, ...]
    clamp: bool
    softcap: float
    sink: str | None
    page_size: int | None


@dataclass(frozen=True)
class Warmed:
    """One call. how: "compiled", "found on disk", "ready" (compiled by an earlier call), or "failed: ..."."""

    call: str
    backend: str
    how: str
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--head-dim-v", type=int, help="of the values; default: as --head-dim")
    parser.add_argument("--heads", type=int, required=True, help="query heads")
    parser.add_argument("--kv-heads", type=int, required=True, help="key heads")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--window",
        type=int,
        action="append",
        metavar="TOKENS",
        help="a sliding window of some layers, 0 for layers without; may be said more than once. Default: 0",
    )
    parser.add_argument("--whole-spans", action="store_true", help="spans longer than the window are seen whole")
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument(
        "--sink",
        nargs="?",
        const="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="layers have attention sinks, of this dtype (default bfloat16)",
    )
    parser.add_argument("--page-size", type=int, help="keys are in pages of so many tokens")
    parser.add_argument("--build", metavar="MODULE", help="the FA4, as it is imported")
    parser.add_argument("--arch", choices=TARGETS, help="compile for this GPU, without one")
    parser.add_argument("--sms", type=int, help="with --arch: the multiprocessors of that GPU")
    parser.add_argument("--json", action="store_true", help="say what was done as JSON")


def main(arguments: argparse.Namespace) -> int:
    """The exit status; what was done goes to stdout."""
    try:
        shape = _shape(arguments)
    except InputError as error:
        print(f"fa4-prefixlm warmup: {error}", file=sys.stderr)
        return 2
    if arguments.arch is not None:
        os.environ.update(TARGETS[arguments.arch])
        if arguments.sms is not None:
            os.environ["FLASH_ATTENTION_NUM_SMS"] = str(arguments.sms)
    folder = disk_cache.root()
    trouble = _trouble(arguments)
    if trouble is not None or folder is None:
        print(trouble)
        return 2
    began = time.monotonic()
    warmed = warm(shape, arguments.build, arguments.arch, quiet=arguments.json)
    seconds = time.monotonic() - began
    if arguments.json:
        print(
            json.dumps({"folder": str(folder), "kernels": dict(disk_cache.counts), "calls": list(map(asdict, warmed))})
        )
    else:
        for own in warmed:
            print(f"{own.call:44} {own.backend:9} {own.how}, {own.seconds:.1f} s")
        made, found = disk_cache.counts["compiled"], disk_cache.counts["loaded"]
        print(f"{made} kernels compiled, {found} found, in {seconds:.1f} s: {folder}")
    return 1 if any(own.how.startswith("failed") for own in warmed) else 0


def warm(shape: Shape, build: str | None, arch: str | None, *, quiet: bool) -> list[Warmed]:
    """Make each call of the shape once. arch: for a GPU that is not here; the environment names it already."""
    warmed = []
    device = _fake_device(build) if arch is not None else contextlib.nullcontext()
    with device:
        calls = list(_calls(shape, build, fake=arch is not None))
        for name, call in tqdm(calls, desc="kernels", unit="call", disable=quiet):
            before, began = dict(disk_cache.counts), time.monotonic()
            try:
                backend = call()
                how = _how(before)
            except Exception as error:
                backend, how = "", f"failed: {type(error).__name__}: {error}"
            warmed.append(Warmed(name, backend, how, round(time.monotonic() - began, 2)))
    return warmed


def _trouble(arguments: argparse.Namespace) -> str | None:
    if disk_cache.root() is None:
        return "there is no cache: it is switched off (FA4_PREFIXLM_CACHE=0), or has no home (FA4_PREFIXLM_CACHE_DIR)"
    if locate.installed(arguments.build) is None:
        return "flash-attn-4 is not installed"
    if arguments.arch is None and not torch.cuda.is_available():
        return "there is no GPU here: --arch sm_90 compiles for one that is elsewhere"
    return None


def _shape(arguments: argparse.Namespace) -> Shape:
    """What was asked for. Raises `InputError`."""
    for name in ("head_dim", "head_dim_v", "heads", "kv_heads", "page_size", "sms"):
        if getattr(arguments, name) is not None:
            whole_number(f"--{name.replace('_', '-')}", getattr(arguments, name), "a positive number", least=1)
    if arguments.heads % arguments.kv_heads:
        raise InputError("--heads", f"a multiple of --kv-heads = {arguments.kv_heads}", arguments.heads)
    for window in arguments.window or []:
        whole_number("--window", window, "a number of tokens, 0 for layers without a window")
    if not (math.isfinite(arguments.softcap) and arguments.softcap >= 0):
        raise InputError("--softcap", "a number of at least 0, 0 for layers without one", arguments.softcap)
    if arguments.sms is not None and arguments.arch is None:
        raise InputError("--sms", "--arch beside it", "none")
    return Shape(
        head_dim=arguments.head_dim,
        head_dim_v=arguments.head_dim_v or arguments.head_dim,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        dtype=arguments.dtype,
        windows=tuple(dict.fromkeys(window or None for window in arguments.window or [0])),
        clamp=not arguments.whole_spans,
        softcap=arguments.softcap,
        sink=arguments.sink,
        page_size=arguments.page_size,
    )


def _calls(shape: Shape, build: str | None, *, fake: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, a call that returns the backend it ran on)."""
    dtype, batch = getattr(torch, shape.dtype), len(SPANS)
    rows: tuple[int, ...] = (batch * TOKENS,)
    where: dict[str, Any] = {"cu_seqlens_q": [TOKENS * index for index in range(batch + 1)]}
    keys: dict[str, Any] = {"cu_seqlens_k": where["cu_seqlens_q"]}
    if shape.page_size is not None:
        pages = -(-TOKENS // shape.page_size)
        rows = (batch * pages, shape.page_size)
        table = torch.empty(batch, pages, dtype=torch.int32, device="cuda")
        if not fake:
            table = torch.arange(batch * pages, dtype=torch.int32, device="cuda").view(batch, pages)
        keys = {"seqused_k": [TOKENS] * batch, "page_table": table}
    q = torch.zeros(batch * TOKENS, shape.heads, shape.head_dim, dtype=dtype, device="cuda")
    k = torch.zeros(*rows, shape.kv_heads, shape.head_dim, dtype=dtype, device="cuda")
    v = torch.zeros(*rows, shape.kv_heads, shape.head_dim_v, dtype=dtype, device="cuda")
    sink = None
    if shape.sink is not None:
        sink = torch.zeros(shape.heads, dtype=getattr(torch, shape.sink), device="cuda")
    options: dict[str, Any] = {"softcap": shape.softcap, "learnable_sink": sink}

    def plain(mask: PrefixLM, spans: Spans) -> str:
        ready = plan(spans, like=(q, k, v), mask=mask, build=build, **where, **keys)
        attention(q, k, v, ready, **options)
        return ready.choice.name

    def serving(mask: PrefixLM, spans: Spans) -> str:
        ready = serving_plan(
            like=(q, k, v),
            max_tokens=batch * TOKENS,
            max_sequences=batch,
            max_pages=keys["page_table"].shape[1],
            mask=mask,
            build=build,
        )
        ready.update(spans, **where, **keys)
        attention(q, k, v, ready, **options)
        return ready.choice.name

    for window in shape.windows:
        mask = PrefixLM(window, clamp=shape.clamp)
        layer = "global" if window is None else f"window {window}"
        for what, spans in (("with spans", SPANS), ("without spans", NO_SPANS)):
            yield f"{layer}, {what}", functools.partial(plain, mask, spans)
            if shape.page_size is not None and not fake:
                yield f"{layer}, {what}, serving plan", functools.partial(serving, mask, spans)


def _how(before: dict[str, int]) -> str:
    made = disk_cache.counts["compiled"] - before.get("compiled", 0)
    found = disk_cache.counts["loaded"] - before.get("loaded", 0)
    if made:
        return "compiled" if not found else f"{made} compiled, {found} found on disk"
    return "found on disk" if found else "ready"


@contextlib.contextmanager
def _fake_device(build: str | None) -> Iterator[None]:
    found = locate.installed(build)
    assert found is not None
    with target_hardware(found.module), FakeTensorMode():
        yield
