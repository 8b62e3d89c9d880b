"""Times in rounds, by a clock that is played."""

from __future__ import annotations

import collections
import itertools
import time

import pytest
import torch

from fa4_prefixlm.testing.timing import Timing, gpu_work, orders, time_in_rounds


@pytest.mark.parametrize("count", range(2, 10))
def test_each_comes_after_every_other_one_equally_often(count: int) -> None:
    names = [str(index) for index in range(count)]
    rounds = orders(names, 9)
    assert all(sorted(own) == names for own in rounds)
    assert 6 <= len(rounds) <= 18
    after = collections.Counter(pair for own in rounds for pair in itertools.pairwise(own))
    assert set(after) == set(itertools.permutations(names, 2))
    assert len(set(after.values())) == 1


def test_few_rounds_and_one_name() -> None:
    assert len(orders(["a", "b", "c"], 1)) == len(orders(["a", "b", "c"], 2)) - 1 == 1
    assert orders(["a"], 3) == [["a"]] * 3
    assert orders([], 3) == []


def test_rounds_are_in_another_order_and_led_in() -> None:
    events: list[str] = []

    def clock(run, calls: int) -> float:
        run()
        events.append(f"timed {calls}")
        return 2.0 if events[-2] == "slow" else 0.5

    calls = {name: lambda name=name: events.append(name) for name in ("slow", "fast")}
    timings = time_in_rounds(calls, rounds=6, round_ms=4.0, clock=clock)
    assert timings == {"slow": Timing(2.0, 0.0), "fast": Timing(0.5, 0.0)}
    in_rounds = events[4:]  # after a first look at how long each takes
    assert in_rounds.count("timed 2") == in_rounds.count("timed 8") == 6
    at = in_rounds.index("timed 8")
    assert in_rounds[at - 9 : at] == ["fast"] * 9, "8 calls before, and the one of the clock itself"
    timed = [event for event in in_rounds if event.startswith("timed")]
    rounds = [timed[at : at + 2] for at in range(0, 12, 2)]
    assert all(sorted(own) == ["timed 2", "timed 8"] for own in rounds)
    assert len({tuple(own) for own in rounds}) == 2, "not always in the same order"


def test_a_time_is_the_median_and_its_spread() -> None:
    assert Timing.of([1.0, 9.0, 2.0]) == Timing(2.0, 4.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_cpu_no_gpu_works() -> None:
    done: list[int] = []
    assert gpu_work(lambda: done.append(1), calls=3) == 0.0
    assert len(done) == 3


@pytest.mark.gpu
def test_the_gpus_work_is_that_of_its_kernels(gpu_report) -> None:
    """However long the host takes between them."""
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def slowly() -> None:
        torch.matmul(matrix, matrix)
        time.sleep(0.02)

    slowly()
    slow, quick = gpu_work(slowly), gpu_work(lambda: torch.matmul(matrix, matrix))
    gpu_report(slow=slow, quick=quick)
    assert 50 < quick < 2000
    assert 0.5 < slow / quick < 2.0
