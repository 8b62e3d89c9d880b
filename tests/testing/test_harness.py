"""What the benchmarks time, and what they hold it to."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import harness

from fa4_prefixlm.testing.timing import Timing

EXACT = torch.ones(4, 2, 8, dtype=torch.float64)


def path(name: str, off: float, *, is_baseline: bool = False) -> harness.Path:
    return harness.Path(name, lambda: EXACT * (1 + off), lambda: EXACT, 1, is_baseline)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def time_in_rounds(calls, **_):
        timed.extend(calls)
        return {name: Timing(1.0, 0.0) for name in calls}

    monkeypatch.setattr(harness, "time_in_rounds", time_in_rounds)
    paths = [path("causal", 2e-3, is_baseline=True), path("right", 2.4e-3), path("wrong", 2.6e-3)]
    paths.append(path("no number", float("nan")))
    results = harness.measure("a workload", paths)
    assert timed == ["causal", "right"]
    assert [own.correct for own in results] == [True, True, False, False]


@pytest.mark.parametrize("off", [0.4, float("nan")])
def test_a_baseline_that_is_wrong_is_none(off: float) -> None:
    with pytest.raises(RuntimeError, match="a workload: causal is .* off, nothing to hold others to"):
        harness.measure("a workload", [path("causal", off, is_baseline=True), path("as wrong", off)])
