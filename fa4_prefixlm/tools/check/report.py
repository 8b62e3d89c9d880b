"""What a check says: a table for a person, JSON, and JUnit XML for a CI."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fa4_prefixlm.testing.machine import describe_machine
from fa4_prefixlm.testing.tables import columns, titled
from fa4_prefixlm.tools.check.judge import CAUSAL, COMPILED, DEFECT, FAILED, OK, RAN, REFUSED, WRONG, Verdict
from fa4_prefixlm.tools.check.session import REFERENCE, BuildResults, CaseResult

SLOW = 0.5


@dataclass(frozen=True)
class CheckReport:
    """level: "quick" or "full". compile_only: the kernels were to be compiled and not run."""

    level: str
    builds: Sequence[BuildResults]
    compile_only: bool = False

    @property
    def is_bad(self) -> bool:
        """Something is wrong, failed, or does not compile."""
        return any(build.is_bad for build in self.builds)

    @property
    def exactness_checked(self) -> bool:
        """At least one output of a backend on FA4 that was asked for was judged by its numbers.

        Neither FA4's causal call, which runs for its error band, nor the reference says anything of a build's masks.
        """
        results = [own for build in self.builds for own in build.results if own.outcome.backend != REFERENCE]
        asked_for = [own for own in results if own.outcome.backend != CAUSAL] or results
        return any(own.outcome.status == RAN for own in asked_for)

    @property
    def ok(self) -> bool | None:
        """None: nothing was found wrong, but nothing was judged either."""
        if self.is_bad:
            return False
        return True if self.exactness_checked else None

    @property
    def exit_status(self) -> int:
        """0: right, or, if that is all that was asked for, compiled. 1: wrong. 2: no output of FA4 was judged."""
        if self.is_bad:
            return 1
        return 0 if self.exactness_checked or (self.compile_only and self._count(COMPILED)) else 2

    def __str__(self) -> str:
        parts = [f"fa4_prefixlm check, {self.level} cases, {describe_machine().gpu}"]
        several = len(self.builds) > 1
        tables = [_table(build, first=several and index == 0) for index, build in enumerate(self.builds)]
        parts += [table for table in tables if table]
        for title, lines in (
            ("wrong or failed", _bad(self.builds)),
            ("refused", _counted(self.builds, REFUSED)),
            ("compiled", _counted(self.builds, COMPILED)),
            (f"slower than {SLOW} of FA4 causal", _slow(self.builds)),
        ):
            if lines:
                parts.append(titled(title, lines))
        parts.append("\n".join(_summary(build) for build in self.builds))
        return "\n\n".join([*parts, self.conclusion()])

    def conclusion(self) -> str:
        """The last line: what was judged, and what came of it."""
        if self.is_bad:
            return f"NOT RIGHT: {len(_bad(self.builds))} wrong or failed, listed above."
        if self.exactness_checked:
            return f"RIGHT: {self._count(RAN)} outputs were judged against float64, and none is wrong."
        compiled, of_reference = self._count(COMPILED), self._count(RAN, REFERENCE)
        said = "every case was refused"
        if compiled:
            why = "--compile-only" if self.compile_only else "there is no GPU here"
            said = f"the kernels of {_times(compiled, 'call')} were compiled for Hopper and not run ({why})"
        line = f"NOT JUDGED: no output of FlashAttention-4; {said}."
        if of_reference:
            return (
                f"{line} The reference, which does not use it, was judged here: {_times(of_reference, 'case')}, right."
            )
        return f"{line} The reference was not run either."

    def as_json(self) -> dict[str, Any]:
        """Plain values; numbers that JSON does not have are texts ("nan", "inf"). No paths, no host names."""
        machine = describe_machine()
        return _plain(
            {
                "level": self.level,
                "exactness_checked": self.exactness_checked,
                "ok": self.ok,
                "machine": {
                    "gpu": machine.gpu,
                    "python": machine.python,
                    "cuda": machine.cuda,
                    "driver": machine.driver,
                    "commit": machine.commit,
                },
                "versions": machine.versions,
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

    def _count(self, status: str, backend: str | None = None) -> int:
        """Outcomes of a status, of one backend or of all."""
        return sum(
            own.outcome.status == status and backend in (None, own.outcome.backend)
            for build in self.builds
            for own in build.results
        )


# --- the table ---

_COLUMNS = ("case", "backend", "verdict", "error", "worst row", "LSE", "of causal", "ms", "first build")


def _table(build: BuildResults, *, first: bool) -> str:
    """Everything that ran or failed, "" if nothing did; the rest is summed up below."""
    rows = [_row(own) for own in build.results if own.verdict.status not in (REFUSED, COMPILED)]
    used = [column for column in range(len(_COLUMNS)) if any(row[column] for row in rows)]
    lines = columns([[row[column] for column in used] for row in (_COLUMNS, *rows)]) if rows else []
    probes = [f"bare build, {outcome.name}: {_said(verdict)}" for outcome, verdict in build.probes]
    title = f"{build.build} ({build.build.module})" + (", the first build" if first else "")
    return titled(title, [*lines, *probes]) if lines or probes else ""


def _row(result: CaseResult) -> tuple[str, ...]:
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


def _bad(builds: Sequence[BuildResults]) -> list[str]:
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


def _counted(builds: Sequence[BuildResults], status: str) -> list[str]:
    """A line for each reason, with the number of cases."""
    counts = Counter(
        f"{build.build}, {own.outcome.backend}: {own.verdict.reason}"
        for build in builds
        for own in build.results
        if own.verdict.status == status
    )
    return [f"{line} ({_times(count, 'case')})" for line, count in counts.items()]


def _times(count: int, thing: str) -> str:
    return f"{count} {thing}" + "s" * (count != 1)


def _slow(builds: Sequence[BuildResults]) -> list[str]:
    return [
        f"{build.build}, {own.case.name}, {own.outcome.backend}: {own.speed.of_causal:.2f}"
        for build in builds
        for own in build.results
        if own.speed is not None and own.speed.of_causal < SLOW
    ]


def _summary(build: BuildResults) -> str:
    statuses = Counter(own.verdict.status for own in build.results)
    said = [f"{statuses[status]} {status}" for status in (OK, COMPILED, REFUSED, WRONG, FAILED) if statuses[status]]
    known = sum(verdict.status == DEFECT for _, verdict in build.probes)
    said += [f"{_times(known, 'known defect')} of the bare build"] if known else []
    bad = sum(verdict.is_bad for _, verdict in build.probes) + len(build.troubles)
    said += [f"{bad} more wrong or failed"] if bad else []
    return f"{build.build}: {', '.join(said) or 'there was nothing to do'}"


# --- JSON and JUnit ---


def _build_as_json(build: BuildResults) -> dict[str, Any]:
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


def _result_as_json(result: CaseResult) -> dict[str, Any]:
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


def _suite(build: BuildResults) -> ElementTree.Element:
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
