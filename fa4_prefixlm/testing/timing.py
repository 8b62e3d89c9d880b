"""Times of several ways to do the same, measured in turns: comparable within one call of `time_in_rounds`. And what the
GPU works in a call, by torch's profiler (`gpu_work`), which a slow host does not change.

Times are CUDA events around a batch of calls. A GPU that comes from lighter work has power to spare, and one that comes
from heavier work is throttled: so before each batch the same path runs for as long, and the order is balanced: each
path follows every other one as often. A random order of nine rounds had one path behind the two heaviest in seven of
them and another in four, and their ratio was 8 % off that of what their kernels take.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
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
        rounds: How often each is timed, about: as `orders` needs it.
        round_ms: How long a batch of calls takes, about.
        clock: Measures one call in a batch of so many; default: `milliseconds`.
    """
    clock = clock or milliseconds
    counts = {name: max(1, round(round_ms / clock(run, 3))) for name, run in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for order in orders(list(calls), rounds):
        for name in order:
            for _ in range(counts[name]):
                calls[name]()
            times[name].append(clock(calls[name], counts[name]))
    return {name: Timing.of(own) for name, own in times.items()}


def orders(names: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of each round. Within rounds each name comes right after every other one equally often.

    Williams' design (Australian Journal of Scientific Research A 2, 1949): of n names in n rounds, of an odd number in
    2 n. It is repeated until there are about as many rounds as asked for; of fewer rounds than names, which can't be
    balanced, it is the beginning.
    """
    count = len(names)
    first = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    square = [[names[(at + shift) % count] for at in first] for shift in range(count)]
    if count % 2 and count > 1:
        square += [order[::-1] for order in square]
    if rounds < count:
        return square[:rounds]
    return square * max(1, round(rounds / max(1, len(square))))


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


def profile_gpu() -> torch.profiler.profile:
    """What the GPU works while this is open; on a CPU what that does, for programs to be tested there."""
    activity = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[activity.CUDA if torch.cuda.is_available() else activity.CPU])


def gpu_busy(profile: torch.profiler.profile) -> float:
    """Microseconds of the GPU's kernels and copies, whatever the host did meanwhile; 0 on a CPU."""
    on_gpu = (own for own in profile.events() if own.device_type.name == "CUDA")
    return float(sum(own.time_range.elapsed_us() for own in on_gpu if not own.is_user_annotation))


def gpu_work(run: Call, calls: int = 10) -> float:
    """Microseconds that the GPU works in one call, the mean of so many. The host may be as slow as it likes."""
    with profile_gpu() as profile:
        for _ in range(calls):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return gpu_busy(profile) / calls
