"""One way to make every speed claim: verify, then time, interleaved, as a ratio to FA4's causal kernel in the same run.

A `Path` is something that can be timed. `measure` checks each path's output against float64, leaves out (and reports)
what is wrong, then times all others, in another order each round. Times are CUDA events around a batch of calls; a
path's time is the median over rounds, its spread (max - min) / median. TFLOP/s count the exact work of its own mask.

Before each batch the same path runs for a while: a GPU that comes from lighter work has power to spare, and without the
lead-in the path that comes next looks faster than it is.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import random
import statistics
import subprocess
from collections.abc import Callable

import torch

from fa4_prefixlm.testing.accuracy import relative_error
from fa4_prefixlm.tools.check.speed import milliseconds

ROUNDS = 9
ROUND_MS = 40.0
BAND = 1.25

Exact = Callable[[], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Path:
    """run: one call, returns the output. exact: its float64 answer. flops: exact work of one call."""

    name: str
    run: Callable[[], torch.Tensor]
    exact: Exact
    flops: int
    is_baseline: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """ms, spread, tflops and of_baseline are None for a path whose answer was wrong."""

    workload: str
    path: str
    error: float
    correct: bool
    ms: float | None = None
    spread: float | None = None
    tflops: float | None = None
    of_baseline: float | None = None


def measure(workload: str, paths: list[Path]) -> list[Result]:
    """Verify and time `paths`, of which exactly one is the baseline (FA4's causal kernel)."""
    baseline = next(path for path in paths if path.is_baseline)
    exact: dict[Exact, torch.Tensor] = {}
    errors: dict[str, float] = {}
    for path in [baseline, *(path for path in paths if path is not baseline)]:
        if path.exact not in exact:
            exact.clear()  # one float64 answer at a time: they are large
            exact[path.exact] = path.exact()
        errors[path.name] = relative_error(path.run(), exact[path.exact])
    exact.clear()
    correct = [path for path in paths if errors[path.name] <= BAND * errors[baseline.name]]
    times: dict[str, list[float]] = {path.name: [] for path in correct}
    calls = {path.name: max(1, round(ROUND_MS / milliseconds(path.run, 3))) for path in correct}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for path in order.sample(correct, len(correct)):
            for _ in range(max(1, calls[path.name] // 2)):
                path.run()
            times[path.name].append(milliseconds(path.run, calls[path.name]))
    median = {name: statistics.median(values) for name, values in times.items()}
    speed = {path.name: path.flops / median[path.name] / 1e9 for path in correct}
    results = []
    for path in paths:
        if path.name not in times:
            results.append(Result(workload, path.name, errors[path.name], False))
            continue
        spread = (max(times[path.name]) - min(times[path.name])) / median[path.name]
        ratio = speed[path.name] / speed[baseline.name]
        results.append(
            Result(workload, path.name, errors[path.name], True, median[path.name], spread, speed[path.name], ratio)
        )
    return results


def show(results: list[Result]) -> None:
    header = f"{'workload':34} {'path':22} {'error':>9} {'ms':>8} {'spread':>7} {'TFLOP/s':>8} {'of causal':>9}"
    print(header)
    for result in results:
        row = f"{result.workload:34} {result.path:22} {result.error:9.2e}"
        if result.ms is None:
            print(f"{row}    WRONG, not timed")
            continue
        print(f"{row} {result.ms:8.3f} {result.spread:7.1%} {result.tflops:8.1f} {result.of_baseline:9.3f}", flush=True)


def save(path: pathlib.Path, results: list[Result], **more: object) -> None:
    """Write the results as JSON with the machine, the versions and the commit they came from."""
    content = {**provenance(), **more, "results": [_rounded(dataclasses.asdict(result)) for result in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


def provenance() -> dict[str, object]:
    versions = {"torch": torch.__version__}
    for package in ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"device": torch.cuda.get_device_name(), "versions": versions, "commit": _commit()}


def _commit() -> str:
    """The commit, marked where the tree had changes. A copy of a tree gets it from the environment, as COMMIT."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    root = pathlib.Path(__file__).parent.parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True, check=False
    )
    if described.returncode == 0:
        return described.stdout.strip()
    return "unknown"


def _rounded(values: dict[str, object]) -> dict[str, object]:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}
