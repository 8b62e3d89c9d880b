"""A check without a GPU: the kernels of the cases are compiled for Hopper and not run; the reference runs here."""

from __future__ import annotations

import itertools
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fa4_prefixlm.tools.check.cases import Case
from fa4_prefixlm.tools.check.judge import CAUSAL, COMPILED, FAILED, REFUSED, Outcome, in_short, judge
from fa4_prefixlm.tools.check.run import run_case
from fa4_prefixlm.tools.check.session import REFERENCE, BuildResults, CaseResult, CheckedBuild, Progress, Wanted
from fa4_prefixlm.tools.check.workers import DISK_CACHE
from fa4_prefixlm.tools.crosscompile import Variant, compile_in_subprocess

ARCH = "sm_90"

# Masks of the cases by the names that `Variant` has for them.
_MASKS = {"prefix_lm": "prefix_lm", "two intervals": "two", "three intervals": "three", "block of tags": "block"}


def crosscheck(builds: Sequence[CheckedBuild], wanted: Wanted, progress: Progress | None = None) -> list[BuildResults]:
    """Compile what the cases run on each build. The reference runs here, on the CPU, except for timed cases."""
    progress = progress or Progress()
    families = [
        (index, family)
        for index in range(len(builds))
        for family in _families(variant_of(case, path) for case, path in _compiled(wanted, index))
    ]
    progress.expect(sum(len(family) for _, family in families))
    compiled: list[dict[Variant, tuple[str, str, str]]] = [{} for _ in builds]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, wanted.jobs)) as threads:
        environments = [
            checked.given.environment(pathlib.Path(folder, f"build{index}")) for index, checked in enumerate(builds)
        ]
        done = threads.map(lambda work: _compile(builds[work[0]], work[1], environments[work[0]], progress), families)
        for (index, family), reports in zip(families, done, strict=True):
            compiled[index].update(zip(family, reports, strict=True))
    results: list[list[CaseResult]] = [[] for _ in builds]
    for index, own in enumerate(results):
        for case, path in _compiled(wanted, index):
            status, reason, kernel = compiled[index][variant_of(case, path)]
            outcome = Outcome(case.name, path, status, reason, kernel=kernel)
            own.append(CaseResult(case, outcome, judge(case, outcome, None)))
    on_cpu = [case for case in wanted.cases if REFERENCE in wanted.backends and not case.timed]
    progress.expect(len(on_cpu))
    for case in on_cpu:
        results[0].append(_reference(case))
        progress.done(f"{case.name}, {REFERENCE} on the CPU")
    return [BuildResults(checked.build, own) for checked, own in zip(builds, results, strict=True)]


def variant_of(case: Case, path: str) -> Variant:
    """The kernel of a case on a path ("causal", or a backend); equal for cases that share it."""
    heads = 2 * case.kernel.group, 2
    return Variant(
        path,
        case.head_dim,
        case.head_dim_v,
        window=None if case.window is None else 256,
        softcap=case.softcap,
        sink=case.sink is not None,
        mask="prefix_lm" if path == CAUSAL else _MASKS[case.mask],
        heads=heads,
        page_size=case.page_size,
        dtype=case.dtype,
    )


def _compiled(wanted: Wanted, index: int) -> list[tuple[Case, str]]:
    return [(case, path) for case, path in itertools.product(wanted.cases, wanted.paths(index)) if path != REFERENCE]


def _families(variants: Iterable[Variant]) -> list[list[Variant]]:
    """Distinct variants, grouped by the kernels they share: two passes begin with the causal call."""
    families: dict[str, list[Variant]] = {}
    for variant in dict.fromkeys(variants):
        families.setdefault(CAUSAL if variant.backend == "two_pass" else variant.backend, []).append(variant)
    return list(families.values())


def _compile(
    checked: CheckedBuild, variants: list[Variant], environment: Mapping[str, str], progress: Progress
) -> list[tuple[str, str, str]]:
    """(status, reason, kernel) of each variant, in a process of their own."""
    own = {name: value for name, value in environment.items() if name != DISK_CACHE}

    def done(report: Mapping[str, Any]) -> None:
        progress.done(f"{report['backend']}, head dim {report['head_dim']}: {_read(report)[0]} ({report['seconds']} s)")

    try:
        reports = compile_in_subprocess(ARCH, variants, build=checked.build.module, environment=own, done=done)
    except RuntimeError as died:
        last = [line for line in str(died).splitlines() if line.strip()][-1]
        return [(FAILED, in_short(last), "")] * len(variants)
    return [_read(report) for report in reports]


def _read(report: Mapping[str, Any]) -> tuple[str, str, str]:
    error = report["error"]
    if error is None:
        return COMPILED, "not run", str(report["kernel"])
    refusal = re.search(r"^UnsupportedError: .*?that can run this call \((.*)\), got", str(error))
    return (REFUSED, refusal[1], "") if refusal else (FAILED, in_short(str(error)), "")


def _reference(case: Case) -> CaseResult:
    device = torch.device("cpu")
    outcome, causal = (run_case(case, path, None, device) for path in (REFERENCE, CAUSAL))
    return CaseResult(case, outcome, judge(case, outcome, causal))
