"""What a check says: a table for a person, JSON, and JUnit XML for a CI."""

from __future__ import annotations

import math
import platform
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fa4_prefixlm.testing.machine import versions
from fa4_prefixlm.tools.check.judge import DEFECT, OK, WRONG, Verdict
from fa4_prefixlm.tools.check.outcomes import CAUSAL, COMPILED, FAILED, REFUSED
from fa4_prefixlm.tools.check.session import BuildReport, Result
from fa4_prefixlm.tools.check.work import REFERENCE

SLOW = 0.5


@dataclass(frozen=True)
class Report:
    """level: "quick" or "full". exactness_checked: the kernels ran, and were not just compiled."""

    level: str
    exactness_checked: bool
    builds: Sequence[BuildReport]

    @property
    def is_bad(self) -> bool:
        return any(build.is_bad for build in self.builds)

    @property
    def is_empty(self) -> bool:
        """No backend on FA4 that was asked for took a single case, so nothing was found out."""
        results = [own for build in self.builds for own in build.results if own.outcome.backend != REFERENCE]
        asked_for = [own for own in results if own.outcome.backend != CAUSAL] or results
        return all(own.outcome.status == REFUSED for own in asked_for)

    def __str__(self) -> str:
        machine = describe_machine()
        parts = [f"fa4_prefixlm check, {self.level} cases, {machine['gpu']}"]
        parts += [_table(build, first=index == 0) for index, build in enumerate(self.builds)]
        for title, lines in (
            ("wrong or failed", _bad(self.builds)),
            ("refused", _counted(self.builds, REFUSED)),
            ("compiled", _counted(self.builds, COMPILED)),
            (f"slower than {SLOW} of FA4 causal", _slow(self.builds)),
        ):
            if lines:
                parts.append("\n".join([title, *(f"  {line}" for line in lines)]))
        parts.append("\n".join(_summary(build) for build in self.builds))
        if not self.exactness_checked:
            parts.append(
                "No GPU here: the kernels were compiled and not run. Whether they are exact was NOT checked.\n"
                "(The reference backend runs on the CPU, and is all that was judged by its numbers.)"
            )
        return "\n\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Plain values; numbers that JSON does not have are texts ("nan", "inf"). No paths, no host names."""
        return _plain(
            {
                "level": self.level,
                "exactness_checked": self.exactness_checked,
                "ok": not self.is_bad,
                "machine": describe_machine(),
                "versions": versions(),
                "builds": [_build_as_json(build) for build in self.builds],
            }
        )

    def as_junit(self) -> str:
        """A test suite per build, a test case per case and backend, and one per probe."""
        suites = ElementTree.Element("testsuites", name="fa4-prefixlm check")
        for build in self.builds:
            suites.append(_suite(build))
        ElementTree.indent(suites)
        return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def describe_machine() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"gpu": "no GPU", "python": platform.python_version()}
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": f"{properties.name} (sm_{properties.major}{properties.minor})", "python": platform.python_version()}


# --- the table ---

_COLUMNS = ("case", "backend", "verdict", "error", "worst row", "LSE", "of causal", "ms", "first build")


def _table(build: BuildReport, *, first: bool) -> str:
    """Everything that ran or failed to; the rest is summed up below."""
    rows = [_row(own) for own in build.results if own.verdict.status not in (REFUSED, COMPILED)]
    used = [column for column in range(len(_COLUMNS)) if column < 3 or any(row[column] for row in rows)]
    table = [_COLUMNS, *rows]
    widths = {column: max(len(row[column]) for row in table) for column in used}
    lines = ["  ".join(f"{row[column]:{widths[column]}}" for column in used).rstrip() for row in table if rows]
    probes = [f"bare build, {outcome.name}: {_said(verdict)}" for outcome, verdict in build.probes]
    title = f"{build.build} ({build.build.module})" + (", the first build" if first else "")
    return "\n".join([title, *(f"  {line}" for line in [*lines, *probes])])


def _row(result: Result) -> tuple[str, ...]:
    outcome, speed = result.outcome, result.speed
    return (
        result.case.name,
        outcome.backend,
        result.verdict.status,
        _short(outcome.error),
        _short(outcome.row_error),
        _short(outcome.lse_error),
        f"{speed.of_causal:.2f}" if speed else "",
        f"{speed.ms:.3f}" if speed else "",
        str(result.agreement) if result.agreement else "",
    )


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _said(verdict: Verdict) -> str:
    return f"{verdict.status}, {verdict.reason}" if verdict.reason else verdict.status


def _bad(builds: Sequence[BuildReport]) -> list[str]:
    lines = []
    for build in builds:
        for own in build.results:
            if own.verdict.is_bad:
                lines.append(f"{build.build}, {own.case.name}, {own.outcome.backend}: {_said(own.verdict)}")
        for outcome, verdict in build.probes:
            if verdict.is_bad:
                lines.append(f"{build.build}, bare build, {outcome.name}: {_said(verdict)}")
        lines += [f"{build.build}, {trouble}" for trouble in build.troubles]
    return lines


def _counted(builds: Sequence[BuildReport], status: str) -> list[str]:
    """A line for each reason, with the number of cases."""
    counts = Counter(
        f"{build.build}, {own.outcome.backend}: {own.verdict.reason}"
        for build in builds
        for own in build.results
        if own.verdict.status == status
    )
    return [f"{line} ({count} {'case' if count == 1 else 'cases'})" for line, count in counts.items()]


def _slow(builds: Sequence[BuildReport]) -> list[str]:
    return [
        f"{build.build}, {own.case.name}, {own.outcome.backend}: {own.speed.of_causal:.2f}"
        for build in builds
        for own in build.results
        if own.speed is not None and own.speed.of_causal < SLOW
    ]


def _summary(build: BuildReport) -> str:
    statuses = Counter(own.verdict.status for own in build.results)
    said = [f"{statuses[status]} {status}" for status in (OK, COMPILED, REFUSED, WRONG, FAILED) if statuses[status]]
    known = sum(verdict.status == DEFECT for _, verdict in build.probes)
    said += [f"{known} known {'defect' if known == 1 else 'defects'} of the bare build"] if known else []
    bad = sum(verdict.is_bad for _, verdict in build.probes) + len(build.troubles)
    said += [f"{bad} more wrong or failed"] if bad else []
    return f"{build.build}: {', '.join(said) or 'nothing to do'}"


# --- JSON and JUnit ---


def _build_as_json(build: BuildReport) -> dict[str, Any]:
    return {
        "name": build.build.name,
        "module": build.build.module,
        "defects": [asdict(defect) for defect in build.build.defects],
        "results": [_result_as_json(own) for own in build.results],
        "probes": [
            {**asdict(outcome), "verdict": verdict.status, "said": verdict.reason} for outcome, verdict in build.probes
        ],
        "troubles": list(build.troubles),
    }


def _result_as_json(result: Result) -> dict[str, Any]:
    speed = asdict(result.speed) if result.speed else None
    return {
        **asdict(result.outcome),
        "verdict": result.verdict.status,
        "reason": result.verdict.reason,
        "limits": asdict(result.verdict.limits) if result.verdict.limits else None,
        "agreement": asdict(result.agreement) if result.agreement else None,
        "speed": speed and {name: value for name, value in speed.items() if name not in ("case", "backend")},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_plain(own) for own in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def _suite(build: BuildReport) -> ElementTree.Element:
    tests = [(own.outcome.backend, own.case.name, own.verdict, own.outcome.seconds) for own in build.results]
    tests += [("bare build", outcome.name, verdict, 0.0) for outcome, verdict in build.probes]
    tests += [("timing", trouble, Verdict(FAILED, trouble), 0.0) for trouble in build.troubles]
    suite = ElementTree.Element("testsuite", name=build.build.name, tests=str(len(tests)))
    counts: Counter[str] = Counter()
    for group, name, verdict, seconds in tests:
        test = ElementTree.SubElement(suite, "testcase", classname=group, name=name, time=f"{seconds:.3f}")
        kind = {WRONG: "failure", FAILED: "error", OK: ""}.get(verdict.status, "skipped")
        counts[kind] += 1
        if kind:
            ElementTree.SubElement(test, kind, message=_said(verdict))
    for attribute, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(counts[kind]))
    return suite
