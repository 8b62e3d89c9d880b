"""One way to make every speed claim: verify, then time, interleaved, as a ratio to FA4's causal kernel in the same run.

A `Path` is something that can be timed. `measure` checks each path's output against float64, leaves out (and reports)
what is wrong, then times all others by `fa4_prefixlm.testing.timing`. TFLOP/s count the exact work of its own mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fa4_prefixlm.testing.accuracy import relative_error
from fa4_prefixlm.testing.bands import causal_limits, row_errors
from fa4_prefixlm.testing.machine import describe_machine
from fa4_prefixlm.testing.tables import columns
from fa4_prefixlm.testing.timing import time_in_rounds

ROUNDS = 9
ROUND_MS = 40.0
BAND, ROW_BAND = 1.25, 2.0

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


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every speed benchmark has: `--save FILE`, `--only TEXT`, `--once`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=pathlib.Path, metavar="FILE", help="keep the results as JSON")
    parser.add_argument("--only", default="", metavar="TEXT", help="only workloads whose name holds TEXT")
    parser.add_argument("--once", action="store_true", help="call every path once, to fill FA4's cache of kernels")
    return parser


def report(where: str, what: str) -> None:
    """Progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {where}: {what}", file=sys.stderr, flush=True)


def lacks_hopper() -> bool:
    """There is no Hopper GPU here; says so."""
    lacking = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9
    if lacking:
        print("this benchmark needs a Hopper GPU")
    return lacking


def measure(workload: str, paths: list[Path]) -> list[Result]:
    """Verify and time `paths`, of which exactly one is the baseline (FA4's causal kernel)."""
    baseline = next(path for path in paths if path.is_baseline)
    exact: dict[Exact, torch.Tensor] = {}
    errors: dict[str, float] = {}
    rows: dict[str, float] = {}
    for path in [baseline, *(path for path in paths if path is not baseline)]:
        report(workload, f"compiling and verifying {path.name}")
        if path.exact not in exact:
            exact.clear()  # one float64 answer at a time: they are large
            exact[path.exact] = path.exact()
        out = path.run()
        errors[path.name] = relative_error(out, exact[path.exact])
        rows[path.name] = float(row_errors(out, exact[path.exact]).max())
    exact.clear()
    usual, off = causal_limits("bfloat16"), (errors[baseline.name], rows[baseline.name])
    hold_baseline(f"{workload}: {baseline.name}", off, (usual.error, usual.row_error))
    correct = {
        path.name: path
        for path in paths
        if errors[path.name] <= BAND * errors[baseline.name] and rows[path.name] <= ROW_BAND * rows[baseline.name]
    }
    report(workload, "timing")
    timings = time_in_rounds({name: path.run for name, path in correct.items()}, rounds=ROUNDS, round_ms=ROUND_MS)
    speed = {name: path.flops / timings[name].ms / 1e9 for name, path in correct.items()}
    results = []
    for path in paths:
        if path.name not in correct:
            results.append(Result(workload, path.name, errors[path.name], False))
            continue
        timing, ratio = timings[path.name], speed[path.name] / speed[baseline.name]
        results.append(
            Result(workload, path.name, errors[path.name], True, timing.ms, timing.spread, speed[path.name], ratio)
        )
    return results


def hold_baseline(what: str, errors: Sequence[float], limits: Sequence[float]) -> None:
    """Raise where what the others are held to is itself further off than it is elsewhere; a NaN is."""
    if not all(error <= limit for error, limit in zip(errors, limits, strict=True)):
        raise RuntimeError(f"{what} is {max(errors):.2g} off, nothing to hold others to")


def show(results: list[Result]) -> None:
    rows = [["workload", "path", "error", "ms", "spread", "TFLOP/s", "of causal"]]
    for result in results:
        row = [result.workload, result.path, f"{result.error:.2e}"]
        if result.ms is None:
            rows.append([*row, "WRONG", "not timed", "", ""])
            continue
        rows.append(
            [*row, f"{result.ms:.3f}", f"{result.spread:.1%}", f"{result.tflops:.1f}", f"{result.of_baseline:.3f}"]
        )
    print("\n".join(columns(rows, right=range(2, 7))), flush=True)


def save(path: pathlib.Path, results: Sequence[Any], **more: object) -> None:
    """Write results, dataclasses, as JSON with the machine, the versions and the commit they came from.

    May be called again with more of them: the file is whole at any time.
    """
    write(path, {**provenance(), **more, "results": [dataclasses.asdict(result) for result in results]})


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
    """As JSON: a line for each value, and for each object in a list of them; four digits of a float."""
    lines = []
    for name, value in rounded(content).items():
        told = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            told = "[\n" + ",\n".join(f"  {json.dumps(own)}" for own in value) + "\n ]"
        lines.append(f" {json.dumps(name)}: {told}")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    beside.replace(path)
    print(f"wrote {path}")


def provenance() -> dict[str, object]:
    machine = describe_machine()
    device = machine.gpus[0].name if machine.gpus else machine.gpu
    return {"device": device, "versions": dict(machine.versions), "commit": machine.commit or "unknown"}


def rounded(value: Any) -> Any:
    """Floats to four digits, at any depth."""
    if isinstance(value, dict):
        return {name: rounded(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(own) for own in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
