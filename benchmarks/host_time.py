"""Host time of making plans and of calls: `python benchmarks/host_time.py --save FILE` on a Hopper GPU.

Each call is timed on the host, in turns with all others and without waiting for the GPU, which is idle when a turn
begins ("host"); and with the wait for what it launched ("done"). Medians, in microseconds. Before that, each way of
making a plan is checked: its rows and tiles against the torch path in every bit, its output against float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from harness import provenance, write

import fa4_prefixlm as fp
from fa4_prefixlm.masks.models import rswa
from fa4_prefixlm.runtime import plans
from fa4_prefixlm.testing.accuracy import exact_attention, relative_error
from fa4_prefixlm.testing.tables import columns

HEADS, HEAD_DIM, WINDOW = (16, 8), 128, 1024
ROUNDS, CALLS = 40, 25
BAND = 4e-3
PAGE = 16


@dataclasses.dataclass(frozen=True)
class Work:
    """Two packed sequences of equal length with spans."""

    tokens: int
    span: int
    every: int

    @property
    def cu(self) -> list[int]:
        return [0, self.tokens // 2, self.tokens]

    @property
    def ranges(self) -> list[list[tuple[int, int]]]:
        half = self.tokens // 2
        return [[(at, at + self.span) for at in range(8, half - self.span, self.every)]] * 2

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(heads: int) -> torch.Tensor:
            return torch.randn(self.tokens, heads, HEAD_DIM, generator=generator, device="cuda", dtype=torch.bfloat16)

        return normal(HEADS[0]), normal(HEADS[1]), normal(HEADS[1])


SMALL, LARGE = Work(128, 30, 40), Work(131072, 256, 1280)


@dataclasses.dataclass(frozen=True)
class Timed:
    """host: microseconds until the call returns, `low` to `high` in 80 % of calls. done: until its kernels have run."""

    name: str
    tokens: int
    host: float
    done: float
    low: float
    high: float


def calls_of(work: Work) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    from flash_attn.cute import flash_attn_varlen_func

    q, k, v = work.tensors()
    mask, like = fp.PrefixLM(WINDOW), (q, k, v)
    lists: dict[str, Any] = {"cu_seqlens_q": work.cu, "cu_seqlens_k": work.cu}
    cu_host = torch.tensor(work.cu, dtype=torch.int32)
    ranges_host = torch.tensor(work.ranges, dtype=torch.int32)
    on_host: dict[str, Any] = {"cu_seqlens_q": cu_host, "cu_seqlens_k": cu_host}
    cu, ranges = cu_host.cuda(), ranges_host.cuda()
    longest: dict[str, Any] = {"max_seqlen_q": work.cu[1], "max_seqlen_k": work.cu[1]}
    on_device: dict[str, Any] = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, **longest}
    ready = fp.plan(work.ranges, like=like, mask=mask, **lists)
    assert ready.choice.name == "native", ready
    no_spans = fp.plan(None, like=like, mask=mask, **lists)
    assert no_spans.choice.name == "causal", no_spans
    several, prompts = rswa.all_layers(WINDOW), [[(0, 20)], [(0, 20)]]
    calls: dict[str, Callable[[], Any]] = {
        "flash_attn_varlen_func, causal": lambda: flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, **longest
        ),
        "plan, lists": lambda: fp.plan(work.ranges, like=like, mask=mask, **lists),
        "plan, host tensors": lambda: fp.plan(ranges_host, like=like, mask=mask, **on_host),
        "plan, device tensors": lambda: fp.plan(ranges, like=like, mask=mask, **on_device),
        "plan, no spans": lambda: fp.plan(None, like=like, mask=mask, **lists),
        "plan, two_pass": lambda: fp.plan(work.ranges, like=like, mask=mask, backend="two_pass", **lists),
        "plan, several intervals": lambda: fp.plan(prompts, like=like, mask=several, **lists),
        "attention(ranges)": lambda: fp.attention(q, k, v, work.ranges, mask=mask, **lists),
        "attention(ranges), device tensors": lambda: fp.attention(q, k, v, ranges, mask=mask, **on_device),
        "attention(plan)": lambda: fp.attention(q, k, v, ready),
        "attention(plan), no spans": lambda: fp.attention(q, k, v, no_spans),
    }
    pages = -(-work.cu[1] // PAGE)
    cache = torch.zeros(2 * pages, PAGE, HEADS[1], HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    table = torch.arange(2 * pages, dtype=torch.int32, device="cuda").view(2, pages)
    used = torch.tensor([work.cu[1]] * 2, dtype=torch.int32, device="cuda")
    serving = fp.serving_plan(
        like=(q, cache, cache), max_tokens=work.tokens, max_sequences=2, max_pages=pages, mask=mask
    )
    calls["serving plan, update"] = lambda: serving.update(
        ranges, cu_seqlens_q=cu, seqused_k=used, page_table=table, total_q=work.tokens
    )
    return calls


def torch_path(make: Callable[[], fp.Plan]) -> fp.Plan:
    """The same plan by the general path."""
    with mock.patch.object(plans, "fills_in_one_launch", return_value=False):
        return make()


def verify(work: Work, calls: dict[str, Callable[[], Any]]) -> list[str]:
    """What is wrong: nothing, or the names of the plans that differ from the torch path or compute something else."""
    wrong = []
    q, k, v = work.tensors()
    for name in ("plan, lists", "plan, host tensors", "plan, device tensors", "plan, two_pass"):
        fast, slow = calls[name](), torch_path(calls[name])
        for part in ("bounds", "tiles"):
            mine, theirs = getattr(fast.prepared, part, None), getattr(slow.prepared, part, None)
            if mine is not None and not (theirs is not None and torch.equal(mine, theirs)):
                wrong.append(f"{name}: {part}")
        if not torch.equal(fp.attention(q, k, v, fast), fp.attention(q, k, v, slow)):
            wrong.append(f"{name}: output")
        if fast.tiles() != slow.tiles() or fast.flops() != slow.flops():
            wrong.append(f"{name}: counts")
    if work.tokens <= 4096:
        spans = tuple(tuple(own) for own in work.ranges)
        exact, _ = exact_attention(
            q, k, v, mask=fp.PrefixLM(WINDOW), spans=spans, seqlens=((work.cu[1],) * 2, (work.cu[1],) * 2)
        )
        for name in ("attention(ranges)", "attention(plan)", "attention(ranges), device tensors"):
            error = relative_error(calls[name](), exact)
            if not error <= BAND:  # a NaN is wrong
                wrong.append(f"{name}: relative error {error:.1e}")
    return wrong


def microseconds(call: Callable[[], Any], count: int) -> list[float]:
    """Host time of each of `count` calls in a row, none waited for; the GPU is idle before the first."""
    torch.cuda.synchronize()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return times


def microseconds_to_the_end(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began)


def measure(work: Work, calls: dict[str, Callable[[], Any]]) -> list[Timed]:
    host: dict[str, list[float]] = {name: [] for name in calls}
    done: dict[str, list[float]] = {name: [] for name in calls}
    # A queue of long kernels would fill up, and the host would wait for it: fewer calls in a row.
    count = CALLS if work is SMALL else 3
    for call in calls.values():
        microseconds(call, 10)
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            host[name] += microseconds(calls[name], count)
            done[name].append(microseconds_to_the_end(calls[name]))
    return [
        Timed(
            name,
            work.tokens,
            statistics.median(host[name]),
            statistics.median(done[name]),
            *(statistics.quantiles(host[name], n=10)[index] for index in (0, 8)),
        )
        for name in calls
    ]


def table(results: list[Timed]) -> list[str]:
    rows = [
        (own.name, str(own.tokens), f"{own.host:.0f}", f"{own.low:.0f} to {own.high:.0f}", f"{own.done:.0f}")
        for own in results
    ]
    return columns([("call", "tokens", "host us", "10 to 90 %", "done us"), *rows], right=(1, 2, 3, 4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=pathlib.Path, metavar="FILE", help="keep the results as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("this benchmark needs a Hopper GPU")
        return 2
    results: list[Timed] = []
    wrong: list[str] = []
    for work in (SMALL, LARGE):
        calls = calls_of(work)
        wrong += [f"{work.tokens} tokens, {what}" for what in verify(work, calls)]
        results += measure(work, calls)
        del calls
        torch.cuda.empty_cache()
    print("\n".join(table(results)))
    for what in wrong:
        print(f"WRONG: {what}")
    if arguments.save:
        content = {
            **provenance(),
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "mask": str(fp.PrefixLM(WINDOW)),
            "wrong": wrong,
            "results": [{**dataclasses.asdict(own), "unit": "us"} for own in results],
        }
        write(arguments.save, content)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
