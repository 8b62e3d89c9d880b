"""Speed, memory and host time of every backward: `python benchmarks/backward.py` on a Hopper GPU.

2 packed sequences of 8192 tokens, 16 query and 8 key heads, bfloat16, image spans of 256 tokens every 1280. Beside each
backward of this library, in the same run: FA4's own causal backward (with the same window), its deterministic one, the
same mask_mod without block sparsity, and cuDNN's flex_attention where nvidia-cudnn-frontend is installed.

Every gradient is verified against float64 before anything is timed; what is wrong is not timed. TFLOP/s count the exact
work of each path's own mask: 2.5 times the forward's, as FlashAttention counts.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator

import torch
from harness import benchmark_parser, hold_baseline, lacks_hopper, provenance, write

import fa4_prefixlm as fp
from fa4_prefixlm.backends.base import Gradients
from fa4_prefixlm.backends.native_backward import NativeGradients
from fa4_prefixlm.backends.select_backward import prepare_backward
from fa4_prefixlm.batch.forward_pass import ForwardPass
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.kernels.launch import mask_code
from fa4_prefixlm.testing.accuracy import relative_error
from fa4_prefixlm.testing.bands import WORST_CAUSAL
from fa4_prefixlm.testing.gradients import TYPICAL
from fa4_prefixlm.testing.tables import columns, markdown
from fa4_prefixlm.testing.timing import time_in_rounds

HEADS = (16, 8)
SPAN, EVERY = 256, 1280
ROUNDS, ROUND_MS = 7, 30.0
BAND = 1.25
LONG = 65536
Grads = tuple[torch.Tensor, ...]
Spans = list[list[tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """`batch` packed sequences of `tokens` each."""

    head_dim: int
    window: int | None = None
    deterministic: bool = False
    batch: int = 2
    tokens: int = 8192

    def __str__(self) -> str:
        kind = "global" if self.window is None else f"window {self.window}"
        return f"{self.batch}x{self.tokens} {kind} hd{self.head_dim}{' deterministic' * self.deterministic}"

    def spans(self) -> Spans:
        return [[(at, at + SPAN) for at in range(64, self.tokens - SPAN, EVERY)]] * self.batch

    def nothing(self) -> Spans:
        return [[]] * self.batch


WORKLOADS = [
    Workload(dim, window, ordered) for ordered in (False, True) for dim in (128, 256, 64) for window in (None, 1024)
]


@dataclasses.dataclass(frozen=True)
class Path:
    """One way to compute gradients. masked: of the spans, or of the causal mask alone."""

    name: str
    run: Callable[[], Grads]
    masked: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """errors: of dq, dk, dv. ms, spread, tflops, of_causal: None where the gradient was wrong."""

    workload: str
    path: str
    errors: tuple[float, float, float]
    correct: bool
    ms: float | None = None
    spread: float | None = None
    tflops: float | None = None
    of_causal: float | None = None


class Case:
    """The tensors of a workload, the plans on them, and their exact gradients."""

    def __init__(self, work: Workload) -> None:
        self.work, total = work, work.batch * work.tokens
        generator = torch.Generator("cuda").manual_seed(0)
        self.q, self.k, self.v, self.dout = (
            torch.randn(total, heads, work.head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
            for heads in (HEADS[0], HEADS[1], HEADS[1], HEADS[0])
        )
        self.cu = [work.tokens * index for index in range(work.batch + 1)]
        self.options = Options(work.head_dim**-0.5)
        self.masked = self._forward(self.plan(work.spans()))
        self.causal = self._forward(self.plan(work.nothing(), backend="causal"))

    def plan(self, spans: Spans, **more: object) -> fp.Plan:
        like = self.q, self.k, self.v
        mask = fp.PrefixLM(self.work.window)
        return fp.plan(spans, like=like, cu_seqlens_q=self.cu, cu_seqlens_k=self.cu, mask=mask, **more)  # type: ignore[arg-type]

    def _forward(self, plan: fp.Plan) -> ForwardPass:
        with torch.no_grad():
            out, lse = fp.attention(self.q, self.k, self.v, plan, return_lse=True)
        return ForwardPass(self.q, self.k, self.v, out, lse)

    def exact(self, masked: bool) -> Grads:
        """Of the first key head and its query heads alone, which is enough: float64 is slow."""
        shared = HEADS[0] // HEADS[1]
        q, k, v, dout = (
            own[:, :heads].double() for own, heads in ((self.q, shared), (self.k, 1), (self.v, 1), (self.dout, shared))
        )
        spans = self.work.spans() if masked else self.work.nothing()
        mask = fp.PrefixLM(self.work.window)
        plan = fp.plan(
            spans, like=(q, k, v), cu_seqlens_q=self.cu, cu_seqlens_k=self.cu, mask=mask, backend="reference"
        )
        return plan.gradients().run(ForwardPass(q, k, v, q, q), dout, None, self.options)

    def of_first_head(self, grads: Grads) -> Grads:
        shared = HEADS[0] // HEADS[1]
        return grads[0][:, :shared], grads[1][:, :1], grads[2][:, :1]

    def path(self, name: str, state: Gradients, *, masked: bool = True) -> Path:
        forward = self.masked if masked else self.causal
        return Path(name, lambda: state.run(forward, self.dout, None, self.options), masked)


def paths(case: Case) -> Iterator[Path]:
    """FA4's causal backward first: the baseline."""
    work = case.work
    causal = case.plan(work.nothing(), backend="causal", backward="causal").gradients(work.deterministic)
    yield case.path("FA4 causal", causal, masked=False)
    native = case.plan(work.spans(), backward="native").gradients(work.deterministic)
    assert isinstance(native, NativeGradients)
    yield case.path("native", native)
    if work.deterministic:
        return
    if native.tile.step == "fa4" and work.head_dim > 64:  # at 64, ptxas serialises the products without the branch
        other = dataclasses.replace(native.tile, skip_full=not native.tile.skip_full)
        name = "native, full tiles unmasked" if other.skip_full else "native, all tiles masked"
        yield case.path(name, dataclasses.replace(native, tile=other))
    yield case.path("packed", case.plan(work.spans(), backward="packed").gradients())
    if work.window is not None:
        yield Path("mask_mod, every tile", _every_tile(case))
    flex = _cudnn_flex(case)
    if flex is not None:
        yield Path("cuDNN flex_attention", flex)


def _every_tile(case: Case) -> Callable[[], Grads]:
    """FA4's varlen backward with the same mask_mod: it takes no block lists."""
    plan = case.plan(case.work.spans(), backend="varlen")
    assert plan.build is not None
    code, lengths, build, forward = mask_code("varlen", plan.bounds), plan.lengths, plan.build, case.masked
    backward = build.part("interface")._flash_attn_bwd

    def run() -> Grads:
        found = backward(
            *(forward.q, forward.k, forward.v, forward.out, case.dout, forward.lse, case.options.softmax_scale),
            cu_seqlens_q=lengths.cu_seqlens_q,
            cu_seqlens_k=lengths.cu_seqlens_k,
            max_seqlen_q=lengths.max_seqlen_q,
            max_seqlen_k=lengths.max_seqlen_k,
            mask_mod=code.mask_mod(build),
            aux_tensors=code.aux_tensors,
        )
        return tuple(found[:3])

    return run


def _cudnn_flex(case: Case) -> Callable[[], Grads] | None:
    try:
        from cudnn import create_mask_plan, flex_attn_func
    except ImportError:
        return None
    plan = case.plan(case.work.spans())
    ends = torch.stack([torch.zeros_like(plan.bounds.lo[:, 0]), plan.bounds.lo[:, 0], plan.bounds.hi[:, 0]])
    leaves = [own.detach().requires_grad_() for own in (case.q, case.k, case.v)]
    lengths = plan.lengths
    mask_plan = create_mask_plan(
        ends.unsqueeze(0).contiguous(),
        *leaves,
        cu_seqlens_q=lengths.cu_seqlens_q,
        cu_seqlens_k=lengths.cu_seqlens_k,
        max_seqlen_q=lengths.max_seqlen_q,
        max_seqlen_k=lengths.max_seqlen_k,
        build_backward=True,
    )
    out = flex_attn_func(*leaves, mask_plan=mask_plan, softmax_scale=case.options.softmax_scale)
    out = out[0] if isinstance(out, tuple) else out
    return lambda: torch.autograd.grad(out, leaves, case.dout, retain_graph=True)


def measure(work: Workload) -> list[Result]:
    """Verify and time every path."""
    case = Case(work)
    found = list(paths(case))
    exact = {masked: case.exact(masked) for masked in (False, True)}
    errors = {
        path.name: tuple(map(relative_error, case.of_first_head(path.run()), exact[path.masked])) for path in found
    }
    baseline = found[0].name
    off = errors[baseline]
    hold_baseline(f"{work}: {baseline}", off, [WORST_CAUSAL * TYPICAL[torch.bfloat16][0]] * len(off))
    right = {
        path.name: path
        for path in found
        if all(own <= BAND * band for own, band in zip(errors[path.name], errors[baseline], strict=True))
    }
    flops = {masked: 2.5 * case.plan(work.spans() if masked else work.nothing()).flops() for masked in (False, True)}
    times = time_in_rounds({name: path.run for name, path in right.items()}, rounds=ROUNDS, round_ms=ROUND_MS)
    speed = {name: flops[right[name].masked] / own.ms / 1e9 for name, own in times.items()}
    results = []
    for path in found:
        result = Result(str(work), path.name, errors[path.name], path.name in right)  # type: ignore[arg-type]
        if path.name in right:
            own, tflops = times[path.name], speed[path.name]
            result = dataclasses.replace(
                result, ms=own.ms, spread=own.spread, tflops=tflops, of_causal=tflops / speed[baseline]
            )
        results.append(result)
    return results


def memory(head_dim: int) -> dict[str, float]:
    """MiB that a forward and a backward take at their peak beyond their inputs, at 65536 tokens; the plan included."""
    work = Workload(head_dim, batch=1, tokens=LONG)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(LONG, heads, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (HEADS[0], HEADS[1], HEADS[1])
    )
    dout = torch.randn_like(q)
    peaks = {}
    for name, spans, backward in (("FA4 causal", work.nothing(), "causal"), ("native", work.spans(), "native")):
        for _ in range(2):  # the first compiles
            gc.collect()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            plan = fp.plan(spans, like=(q, k, v), cu_seqlens_q=[0, LONG], cu_seqlens_k=[0, LONG], backward=backward)
            grads = torch.autograd.grad(fp.attention(q, k, v, plan), (q, k, v), dout)
            torch.cuda.synchronize()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            del plan, grads
    return {**peaks, "ratio": peaks["native"] / peaks["FA4 causal"]}


def host_times() -> dict[str, float]:
    """Microseconds of the host, the GPU idle: the plan for the backward, and one backward."""
    case = Case(Workload(128, 1024))
    plan = case.plan(case.work.spans())
    times = {}
    for deterministic in (False, True):
        name = "plan of the native backward" + ", deterministic" * deterministic

        def prepare(deterministic: bool = deterministic) -> object:
            return prepare_backward("native", plan._batch, forward="native", deterministic=deterministic)

        times[name] = _host(prepare)
    native, causal = plan.gradients(), case.plan(case.work.nothing()).gradients()
    times["native backward"] = _host(lambda: native.run(case.masked, case.dout, None, case.options))
    times["FA4 causal backward"] = _host(lambda: causal.run(case.causal, case.dout, None, case.options))
    return times


def _host(run: Callable[[], object], calls: int = 20) -> float:
    times = []
    run()
    for _ in range(calls):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1e6)
    torch.cuda.synchronize()
    return sorted(times)[calls // 2]


HEADER = ["workload", "path", "error", "ms", "spread", "TFLOP/s", "of FA4 causal"]


def rows_of(results: list[Result]) -> list[list[str]]:
    rows = []
    for result in results:
        row = [result.workload, result.path, f"{max(result.errors):.1e}"]
        if result.ms is None:
            rows.append([*row, "WRONG, not timed", "", "", ""])
        else:
            rows.append(
                [*row, f"{result.ms:.3f}", f"{result.spread:.1%}", f"{result.tflops:.0f}", f"{result.of_causal:.3f}"]
            )
    return rows


def main() -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    if lacks_hopper():
        return 2
    results: list[Result] = []
    for work in WORKLOADS:
        if arguments.only not in str(work):
            continue
        if arguments.once:
            for path in paths(Case(work)):
                path.run()
            continue
        measured = measure(work)
        print("\n".join(columns([HEADER, *rows_of(measured)], right=(2, 3, 4, 5, 6))), flush=True)
        results += measured
        gc.collect()
    if arguments.once:
        return 0
    host, held = host_times(), {f"hd{dim}": memory(dim) for dim in (128, 256)}
    print("\n".join(columns([[name, f"{value:.0f} us"] for name, value in host.items()], right=(1,))))
    print(f"forward and backward at {LONG} tokens, MiB: {held}")
    if arguments.markdown:
        print("\n".join(markdown(HEADER, rows_of(results))))
    if arguments.save:
        content = {
            **provenance(),
            "heads": HEADS,
            "dtype": "bfloat16",
            "spans": f"{SPAN} tokens every {EVERY}",
            "host_us": host,
            "memory_mib": held,
            "results": [dataclasses.asdict(result) for result in results],
        }
        write(arguments.save, content)
    return 0 if all(result.correct for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
