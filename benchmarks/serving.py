"""Speed with keys in pages, and what a step costs an engine: `python benchmarks/serving.py` on a Hopper GPU.

Like forward.py, but the baseline is FA4's own paged causal call on the same pages (page size 16, and the key tile).
Beside it: native; two_pass, and the keys gathered first, then varlen (both run where native is not offered); the
mask_mod without block sparsity on the same pages, which is how vLLM 0.33 calls FA4. Then one `update` and one replayed
layer.

`--build vllm.vllm_flash_attn.cute` runs all of it on vLLM's fork.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from forward import HEADS, Workload
from harness import Path, Result, benchmark_parser, lacks_hopper, measure, save, show

import fa4_prefixlm as fp
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.builds.locate import installed
from fa4_prefixlm.fa4.kernels.launch import causal_forward, mask_code, on_device
from fa4_prefixlm.testing.accuracy import exact_attention
from fa4_prefixlm.testing.pages import shuffled_pages
from fa4_prefixlm.testing.tables import columns

WORKLOADS = [
    (Workload(2, 8192, 128), (16, 128)),
    (Workload(2, 8192, 256), (16, 80)),
    (Workload(2, 8192, 128, window=1024), (16, 128)),
    (Workload(2, 8192, 256, window=1024), (16, 64)),
    (Workload(1, 16384, 256, window=1024), (16, 64)),
    (Workload(4, 10240, 128, cached=8192), (16, 128)),
    (Workload(4, 10240, 256, window=1024, cached=8192), (16, 64)),
]


def paths(work: Workload, page_size: int, build: str | None) -> list[Path]:
    queries = work.tokens - work.cached
    cu_q, used = [queries * index for index in range(work.batch + 1)], [work.tokens] * work.batch
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(work.batch, tokens, heads, work.head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
        for tokens, heads in ((queries, HEADS[0]), (work.tokens, HEADS[1]), (work.tokens, HEADS[1]))
    )
    pages = shuffled_pages(k.flatten(0, 1), v.flatten(0, 1), used, page_size, seed=0)
    table = pages.table[:, : -(-work.tokens // page_size)].cuda()
    q, k_cache, v_cache = q.flatten(0, 1), pages.k, pages.v
    mask, spans = fp.PrefixLM(work.window), work.spans()

    def plan_for(backend: str, ranges: list[list[tuple[int, int]]]) -> fp.Plan:
        return fp.plan(
            ranges,
            like=(q, k_cache, v_cache),
            cu_seqlens_q=cu_q,
            seqused_k=used,
            page_table=table,
            mask=mask,
            backend=backend,
            build=build,
        )

    plans = {
        "native": plan_for("native", spans),
        "two_pass": plan_for("two_pass", spans),
        "gathered, varlen": plan_for("varlen", spans),
    }
    plan = plans["native"]
    keys, fa4 = plan.keys, plan.build
    assert fa4 is not None
    where: dict[str, Any] = {"build": fa4, "cu_seqlens_q": plan.lengths.cu_seqlens_q, "max_seqlen_q": queries}
    scale = work.head_dim**-0.5

    def exact(ranges: list[list[tuple[int, int]]]) -> torch.Tensor:
        own = tuple(tuple(pairs) for pairs in ranges)
        seqlens = ((queries,) * work.batch, (work.tokens,) * work.batch)
        return exact_attention(q, k.flatten(0, 1), v.flatten(0, 1), mask=mask, spans=own, seqlens=seqlens)[0]

    def masked_exact() -> torch.Tensor:
        return exact(spans)

    def causal_exact() -> torch.Tensor:
        return exact([[]] * work.batch)

    def causal() -> torch.Tensor:
        return causal_forward(q, k_cache, v_cache, **where, keys=keys, options=Options(scale), window=work.window)[0]

    code = mask_code("varlen", plan.bounds)

    def every_tile() -> torch.Tensor:
        with on_device(q):
            return fa4.part("interface")._flash_attn_fwd(
                q,
                k_cache,
                v_cache,
                cu_seqlens_q=plan.lengths.cu_seqlens_q,
                max_seqlen_q=queries,
                seqused_k=keys.seqused_k,
                page_table=keys.page_table,
                softmax_scale=scale,
                mask_mod=code.mask_mod(fa4),
                aux_tensors=code.aux_tensors,
                return_lse=True,
            )[0]

    causal_flops = plan_for("native", [[]] * work.batch).flops()
    named = [Path("fa4 causal", causal, causal_exact, causal_flops, is_baseline=True)]
    for name, own in plans.items():
        run = functools.partial(fp.attention, q, k_cache, v_cache, own)
        named.append(Path(name, run, masked_exact, plan.flops()))
    named.append(Path("mask_mod, every tile", every_tile, masked_exact, plan.flops()))
    return named


@dataclasses.dataclass(frozen=True)
class Step:
    """Microseconds: of GPU time, and of host time until the call returns. Medians."""

    what: str
    gpu_us: float
    host_us: float


def steps(build: str | None) -> list[Step]:
    """One `update` for 64 sequences, 16K tokens and 64 spans; one layer of it replayed, and FA4's causal beside it."""
    sequences, tokens, page_size, head_dim = 64, 16384, 16, 128
    each = tokens // sequences
    q = torch.randn(tokens, HEADS[0], head_dim, device="cuda", dtype=torch.bfloat16)
    k_cache, v_cache = (
        torch.randn(tokens // page_size, page_size, HEADS[1], head_dim, device="cuda").to(q) for _ in range(2)
    )
    table = torch.randperm(tokens // page_size, device="cuda").to(torch.int32).view(sequences, -1)
    plan = fp.serving_plan(
        like=(q, k_cache, v_cache),
        max_tokens=tokens,
        max_sequences=sequences,
        max_pages=table.shape[1],
        mask=fp.PrefixLM(1024),
        build=build,
    )
    cu = (torch.arange(sequences + 1, device="cuda") * each).to(torch.int32)
    used = torch.full((sequences,), each, dtype=torch.int32, device="cuda")
    ranges = torch.tensor([[[16, 216]]] * sequences, dtype=torch.int32, device="cuda")

    def update() -> None:
        plan.update(ranges, cu_seqlens_q=cu, seqused_k=used, page_table=table)

    def layer() -> torch.Tensor:
        return fp.attention(q, k_cache, v_cache, plan)

    fa4 = installed(build)
    assert fa4 is not None
    keys = Keys(each, seqused_k=used, page_table=table)

    def causal() -> torch.Tensor:
        return causal_forward(
            q,
            k_cache,
            v_cache,
            build=fa4,
            cu_seqlens_q=cu,
            max_seqlen_q=each,
            keys=keys,
            options=Options(head_dim**-0.5),
            window=1024,
        )[0]

    update()
    found = [_step("plan.update", update), _step("native, called", layer), _step("fa4 causal, called", causal)]
    for name, run in (("native, replayed", layer), ("fa4 causal, replayed", causal)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        found.append(_step(name, graph.replay))
    return found


def _step(what: str, run: Callable[[], object], rounds: int = 9, calls: int = 50) -> Step:
    for _ in range(5):
        run()
    gpu, host = [], []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        host.append((time.perf_counter() - began) / calls * 1e6)
        torch.cuda.synchronize()
        gpu.append(_gpu_us(run, calls))
    return Step(what, statistics.median(gpu), statistics.median(host))


def _gpu_us(run: Callable[[], object], calls: int) -> float:
    """Microseconds of kernels in one call: the sum over what the profiler saw, gaps between launches left out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in profile.key_averages()) / calls


def main() -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--build", metavar="MODULE", help="the FA4 to run on, as it is imported")
    arguments = parser.parse_args()
    if lacks_hopper():
        return 2
    results: list[Result] = []
    for work, page_sizes in WORKLOADS:
        for page_size in page_sizes:
            if arguments.only not in str(work):
                continue
            if arguments.once:
                for path in paths(work, page_size, arguments.build):
                    path.run()
            else:
                measured = measure(f"{work}, pages of {page_size}", paths(work, page_size, arguments.build))
                show(measured)
                results += measured
    if arguments.once:
        return 0
    found = steps(arguments.build)
    rows = [[step.what, f"{step.gpu_us:.1f} us GPU", f"{step.host_us:.1f} us host"] for step in found]
    print("\n".join(columns(rows, right=(1, 2))))
    if arguments.save:
        more = {"heads": HEADS, "dtype": "bfloat16", "build": arguments.build or "flash_attn.cute"}
        save(arguments.save, results, **more, steps=[dataclasses.asdict(step) for step in found])
    return 0 if all(result.correct for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
