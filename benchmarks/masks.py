"""Masks by backend, forward: `python benchmarks/masks.py` on a Hopper GPU.

2 x 8192 tokens, 16 query and 8 key heads of 128, bfloat16. Each mask on every backend that takes it, and on torch's own
FlexAttention with the block mask that `create_block_mask` makes of the same rule; TFLOP/s count the mask's exact work,
and are compared with FA4's causal kernel. Beside the time of a call, what the GPU works in one, by torch's profiler: a
slow host makes short calls longer, and this not. Then what it takes to plan a batch of 16384 tokens: ours and theirs.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from harness import Path, Result, benchmark_parser, lacks_hopper, measure, report, save, show
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import fa4_prefixlm as fp
from fa4_prefixlm.backends.select import BACKENDS
from fa4_prefixlm.masks import causal, key_in, one_block, prefix, same_span, window
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.testing.accuracy import exact_attention
from fa4_prefixlm.testing.tables import columns
from fa4_prefixlm.testing.timing import gpu_work

BATCH, TOKENS, HEADS, HEAD_DIM = 2, 8192, (16, 8), 128
PLAN_TOKENS = 16384
PLAN_CALLS = 20

Spans = dict[str, list[list[tuple[int, int]]]]


@dataclass(frozen=True)
class Workload:
    """A mask, and the spans of one sequence by name: (length, distance from one to the next)."""

    name: str
    mask: Mask
    every: dict[str, tuple[int, int]]

    def spans(self, tokens: int, batch: int) -> Spans:
        return {
            name: [[(at, at + length) for at in range(0, tokens - length + 1, step)]] * batch
            for name, (length, step) in self.every.items()
        }


IMAGES = (256, 1280)
WORKLOADS = [
    Workload("images, global", fp.PrefixLM(), {"image": IMAGES}),
    Workload("images, window 1024", fp.PrefixLM(1024), {"image": IMAGES}),
    Workload("prompt and window", causal & (prefix("prompt") | window(1024)), {"prompt": (512, 10**9)}),
    Workload("documents", causal & same_span("document"), {"document": (2048, 2048)}),
    Workload("images, one block", causal | one_block("image"), {"image": IMAGES}),
    Workload("window and 5 images", causal & (window(1024) | key_in("image")), {"image": (256, 1638)}),
    Workload("window and 8 images", causal & (window(1024) | key_in("image")), {"image": (256, 1024)}),
    Workload("window and 16 images", causal & (window(1024) | key_in("image")), {"image": (128, 512)}),
]


def tensors(total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(total, heads, HEAD_DIM, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS[0], HEADS[1], HEADS[1])
    )
    return q, k, v


def paths(work: Workload, backends: Sequence[str]) -> list[Path]:
    q, k, v = tensors(BATCH * TOKENS)
    cu = [TOKENS * index for index in range(BATCH + 1)]
    spans = work.spans(TOKENS, BATCH)

    def plan_for(mask: Mask, named: Spans | None, backend: str) -> fp.Plan:
        return fp.plan(named, like=(q, k, v), cu_seqlens_q=cu, cu_seqlens_k=cu, mask=mask, backend=backend)

    def exact_of(plan: fp.Plan) -> Callable[[], torch.Tensor]:
        named = {name: own.on_host() for name, own in plan.spans.items()}
        return lambda: exact_attention(q, k, v, mask=plan.mask, spans=named, seqlens=plan.lengths.on_host())[0]

    plain = plan_for(causal, None, "causal")
    named = [
        Path(
            "fa4 causal",
            functools.partial(fp.attention, q, k, v, plain),
            exact_of(plain),
            plain.flops(),
            is_baseline=True,
        )
    ]
    any_backend = plan_for(work.mask, spans, "auto")
    exact, flops = exact_of(any_backend), any_backend.flops()
    for backend in backends:
        try:
            plan = plan_for(work.mask, spans, backend)
        except fp.UnsupportedError:
            continue
        named.append(Path(backend, functools.partial(fp.attention, q, k, v, plan), exact, flops))
    return [*named, Path("FlexAttention, its own block mask", flex_peer(work, q, k, v), exact, flops)]


def flex_peer(work: Workload, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    """FlexAttention as torch has it, compiled for these very shapes."""
    block_mask = their_plan(work, TOKENS, BATCH)
    q, k, v = (own.unflatten(0, (BATCH, TOKENS)).transpose(1, 2) for own in (q, k, v))
    run = torch.compile(flex_attention, dynamic=False)
    return lambda: run(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def their_plan(work: Workload, tokens: int, batch: int) -> BlockMask:
    """`create_block_mask` over the mask's rule, pair by pair."""
    rule = work.mask.flex(seqlen=tokens, ranges=work.spans(tokens, batch), device="cuda")
    return create_block_mask(rule, batch, None, tokens, tokens, device="cuda")


def plan_times(work: Workload, *, compiled: bool) -> dict[str, float | str]:
    """Milliseconds to plan one sequence of `PLAN_TOKENS`, the median of several calls with the device's work.

    compiled: theirs under `torch.compile` too, which takes minutes to compile for so many pairs.
    """
    report(work.name, "planning")
    like, cu = tensors(PLAN_TOKENS), [0, PLAN_TOKENS]
    spans = work.spans(PLAN_TOKENS, 1)
    rule = work.mask.flex(seqlen=PLAN_TOKENS, ranges=spans, device="cuda")

    def theirs(make: Callable[..., BlockMask]) -> BlockMask:
        return make(rule, 1, None, PLAN_TOKENS, PLAN_TOKENS, device="cuda")

    ours = _median_ms(
        lambda: fp.plan(spans, like=like, cu_seqlens_q=cu, cu_seqlens_k=cu, mask=work.mask, backend="flex")
    )
    times: dict[str, float | str] = {"workload": work.name, "flex": ours}
    times["create_block_mask"] = _median_ms(functools.partial(theirs, create_block_mask))
    if compiled:
        fused = torch.compile(create_block_mask, dynamic=False)
        times["create_block_mask, compiled"] = _median_ms(functools.partial(theirs, fused))
    return times


def _median_ms(make: Callable[[], object]) -> float:
    times = []
    for _ in range(PLAN_CALLS + 3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        make()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return float(f"{statistics.median(times[3:]):.4g}")


def work_times(work: Workload, paths: Sequence[Path], measured: Sequence[Result]) -> dict[str, float | str]:
    """Microseconds that the GPU works in a call of each path that was timed."""
    timed = {own.path for own in measured if own.correct}
    return {"workload": work.name, **{path.name: gpu_work(path.run) for path in paths if path.name in timed}}


def show_rows(rows: Sequence[dict[str, float | str]]) -> None:
    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name, "")) for name in header] for row in rows]
    print("\n".join(columns([header, *cells], right=range(1, len(header)))), flush=True)


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def main() -> int:
    parser = benchmark_parser(__doc__)
    names = [name for name in BACKENDS if name != "reference"]
    parser.add_argument("--backends", nargs="+", default=names, choices=names, help="beside FA4's causal kernel")
    parser.add_argument("--plans", action="store_true", help="only what it takes to plan")
    parser.add_argument(
        "--compiled", action="store_true", help="FlexAttention's plans under torch.compile too: minutes"
    )
    arguments = parser.parse_args()
    if lacks_hopper():
        return 2
    works = [work for work in WORKLOADS if arguments.only in work.name]
    if arguments.once:
        for work in works:
            for path in [] if arguments.plans else paths(work, arguments.backends):
                report(work.name, path.name)
                path.run()
            plan_times(work, compiled=arguments.compiled)
        return 0
    results: list[Result] = []
    plans: list[dict[str, float | str]] = []
    on_gpu: list[dict[str, float | str]] = []
    more = {"batch": BATCH, "tokens": TOKENS, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
    for work in works:
        if not arguments.plans:
            own = paths(work, arguments.backends)
            measured = measure(work.name, own)
            show(measured)
            results += measured
            on_gpu.append(work_times(work, own, measured))
        plans.append(plan_times(work, compiled=arguments.compiled))
        if arguments.save:  # at once: a run that is cut off keeps what it had
            save(arguments.save, results, **more, gpu_us=on_gpu, plan_tokens=PLAN_TOKENS, plan_ms=plans)
    if on_gpu:
        print("microseconds of the GPU's work in a call")
        show_rows(on_gpu)
    print(f"milliseconds to plan {PLAN_TOKENS} tokens")
    show_rows(plans)
    return 0 if all(result.correct for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
