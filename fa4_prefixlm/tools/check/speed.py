"""Time one case: every backend in turns with FA4's own causal call, in one process, as benchmarks/harness.py does."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

import torch

from fa4_prefixlm.tools.check.cases import Case
from fa4_prefixlm.tools.check.outcomes import CAUSAL, Speed
from fa4_prefixlm.tools.check.run import attend, plan_case

ROUNDS = 7
ROUND_MS = 25.0


def time_case(case: Case, backends: Sequence[str], build: str | None, device: torch.device) -> list[Speed]:
    """The speeds of backends that were found right, `CAUSAL` first. Their kernels should be compiled already.

    Times are CUDA events around a batch of calls, the median over rounds. Before each batch the same path runs for half
    as long, so that none is timed on the power that a lighter one left.
    """
    plans = {name: plan_case(case, name, build, device) for name in dict.fromkeys([CAUSAL, *backends])}

    def call(name: str) -> Callable[[], object]:
        return lambda: attend(case, plans[name], device)

    calls = {name: call(name) for name in plans}
    counts = {name: max(1, round(ROUND_MS / milliseconds(run, 3))) for name, run in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in plans}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(plans), len(plans)):
            for _ in range(max(1, counts[name] // 2)):
                calls[name]()
            times[name].append(milliseconds(calls[name], counts[name]))
    middle = {name: statistics.median(own) for name, own in times.items()}
    tflops = {name: plans[name].flops() / middle[name] / 1e9 for name in plans}
    return [
        Speed(
            case=case.name,
            backend=name,
            ms=middle[name],
            tflops=tflops[name],
            of_causal=tflops[name] / tflops[CAUSAL],
            spread=(max(own) - min(own)) / middle[name],
        )
        for name, own in times.items()
    ]


def milliseconds(run: Callable[[], object], calls: int) -> float:
    """Of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls
