"""Forward speed of every backend: `python benchmarks/forward.py` on a Hopper GPU.

16 query and 8 key heads, bfloat16, image spans of 256 tokens every 1280. Beside each backend: FA4's own causal kernel
(with the same window), and the same mask_mod without block sparsity, which is how vLLM 0.33 calls FA4.
"""

from __future__ import annotations

import dataclasses
import functools
import sys

import torch
from harness import Path, Result, benchmark_parser, lacks_hopper, measure, save, show

import fa4_prefixlm as fp
from fa4_prefixlm.backends.mask_mod_call import MaskModCall
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.kernels.launch import causal_forward
from fa4_prefixlm.fa4.kernels.tiles import forward_tile
from fa4_prefixlm.testing.accuracy import exact_attention

HEADS = (16, 8)
SPAN, EVERY = 256, 1280


@dataclasses.dataclass(frozen=True)
class Workload:
    """`batch` packed sequences of `tokens` each; the last `tokens - cached` of each are the queries."""

    batch: int
    tokens: int
    head_dim: int
    window: int | None = None
    cached: int = 0

    def __str__(self) -> str:
        kind = "global" if self.window is None else f"window {self.window}"
        chunk = f" after {self.cached} cached" if self.cached else ""
        return f"{self.batch}x{self.tokens - self.cached}{chunk}, {kind}, hd{self.head_dim}"

    def spans(self) -> list[list[tuple[int, int]]]:
        return [[(at, at + SPAN) for at in range(64, self.tokens - SPAN, EVERY)]] * self.batch


WORKLOADS = [
    Workload(2, 8192, 128),
    Workload(2, 8192, 256),
    Workload(2, 8192, 128, window=1024),
    Workload(2, 8192, 256, window=1024),
    Workload(2, 8192, 64, window=1024),
    Workload(1, 16384, 256, window=1024),
    Workload(4, 10240, 256, window=1024, cached=8192),
    Workload(32, 384, 128),
]


def paths(work: Workload) -> list[Path]:
    queries = work.tokens - work.cached
    cu_q = [queries * index for index in range(work.batch + 1)]
    cu_k = [work.tokens * index for index in range(work.batch + 1)]
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(total, heads, work.head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
        for total, heads in ((cu_q[-1], HEADS[0]), (cu_k[-1], HEADS[1]), (cu_k[-1], HEADS[1]))
    )
    mask, spans = fp.PrefixLM(work.window), work.spans()

    def plan_for(backend: str, ranges: list[list[tuple[int, int]]]) -> fp.Plan:
        return fp.plan(ranges, like=(q, k, v), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, mask=mask, backend=backend)

    plans = {backend: plan_for(backend, spans) for backend in ("native", "varlen", "packed", "two_pass")}
    lengths = plans["varlen"].lengths
    causal_flops = plan_for("varlen", [[]] * work.batch).flops()
    flops = plans["varlen"].flops()

    def exact(ranges: list[list[tuple[int, int]]]) -> torch.Tensor:
        own = tuple(tuple(pairs) for pairs in ranges)
        return exact_attention(q, k, v, mask=mask, spans=own, seqlens=lengths.on_host())[0]

    def masked_exact() -> torch.Tensor:
        return exact(spans)

    def causal_exact() -> torch.Tensor:
        return exact([[]] * work.batch)

    keys = Keys(work.tokens, cu_seqlens_k=lengths.cu_seqlens_k)
    build = plans["varlen"].build
    assert build is not None

    def causal() -> torch.Tensor:
        return causal_forward(
            q,
            k,
            v,
            build=build,
            cu_seqlens_q=lengths.cu_seqlens_q,
            max_seqlen_q=queries,
            keys=keys,
            options=Options(work.head_dim**-0.5),
            window=work.window,
        )[0]

    every_tile = plan_for("varlen", spans)
    prepared = every_tile.prepared
    assert isinstance(prepared, MaskModCall)
    tile = forward_tile(90, work.head_dim, work.head_dim, windowed=False, max_seqlen_q=queries)  # FA4's own choice
    every_tile.prepared = dataclasses.replace(prepared, lists=None, tile=tile, pack_gqa=True)

    named = [Path("fa4 causal", causal, causal_exact, causal_flops, is_baseline=True)]
    for name, plan in {**plans, "mask_mod, every tile": every_tile}.items():
        named.append(Path(name, functools.partial(fp.attention, q, k, v, plan), masked_exact, flops))
    return named


def main() -> int:
    parser = benchmark_parser(__doc__)
    arguments = parser.parse_args()
    if lacks_hopper():
        return 2
    results: list[Result] = []
    for work in WORKLOADS:
        if arguments.only not in str(work):
            continue
        if arguments.once:
            for path in paths(work):
                path.run()
        else:
            measured = measure(str(work), paths(work))
            show(measured)
            results += measured
    if arguments.save:
        save(arguments.save, results, heads=HEADS, dtype="bfloat16", spans=f"{SPAN} tokens every {EVERY}")
    return 0 if all(result.correct for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
