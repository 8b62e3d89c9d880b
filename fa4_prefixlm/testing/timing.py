"""Times of several ways to do the same, measured in turns: comparable within one call of `time_in_rounds`.

Times are CUDA events around a batch of calls. Before each batch the same path runs for half as long: a GPU that comes
from lighter work has power to spare, and without the lead-in the path that comes next looks faster than it is.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Of one call.

    Attributes:
        ms: Milliseconds, the median over the rounds.
        spread: (slowest round - fastest) / median.
    """

    ms: float
    spread: float

    @classmethod
    def of(cls, rounds: list[float]) -> Timing:
        middle = statistics.median(rounds)
        return cls(middle, (max(rounds) - min(rounds)) / middle)


def time_in_rounds(
    calls: Mapping[str, Call], *, rounds: int, round_ms: float, clock: Callable[[Call, int], float] | None = None
) -> dict[str, Timing]:
    """Time each call, in another order every round. Kernels should be compiled already.

    Args:
        calls: What to time, by name.
        rounds: How often each is timed.
        round_ms: How long a batch of calls takes, about.
        clock: Measures one call in a batch of so many; default: `milliseconds`.
    """
    clock = clock or milliseconds
    counts = {name: max(1, round(round_ms / clock(run, 3))) for name, run in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            for _ in range(max(1, counts[name] // 2)):
                calls[name]()
            times[name].append(clock(calls[name], counts[name]))
    return {name: Timing.of(own) for name, own in times.items()}


def milliseconds(run: Call, calls: int) -> float:
    """Of one call on the GPU, in a batch of `calls`, after one that is not timed."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls
