"""All of a check on a GPU: the work is done in processes, then judged, then what is right is timed."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from fa4_prefixlm.fa4.build.describe import Build
from fa4_prefixlm.tools.check.cases import Case
from fa4_prefixlm.tools.check.judge import OK, Agreement, Verdict, judge, judge_agreement, judge_probe
from fa4_prefixlm.tools.check.outcomes import CAUSAL, FAILED, RAN, Outcome, ProbeOutcome, Speed
from fa4_prefixlm.tools.check.pool import Answer, LostError, Request, Worker, ask_all
from fa4_prefixlm.tools.check.probes import PROBES
from fa4_prefixlm.tools.check.work import REFERENCE, Outputs, Target, Team, Wanted, requests, team


@dataclass(frozen=True)
class Result:
    """One case on one backend. agreement: with the first build; None on that one, and where either did not run."""

    case: Case
    outcome: Outcome
    verdict: Verdict
    agreement: Agreement | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class BuildReport:
    """What came of one build; results in the order of the cases and backends. troubles: what failed besides."""

    build: Build
    results: Sequence[Result] = ()
    probes: Sequence[tuple[ProbeOutcome, Verdict]] = ()
    troubles: Sequence[str] = ()

    @property
    def is_bad(self) -> bool:
        verdicts = [*(result.verdict for result in self.results), *(verdict for _, verdict in self.probes)]
        return bool(self.troubles) or any(verdict.is_bad for verdict in verdicts)


@dataclass(frozen=True)
class Progress:
    """Told how many more things there are to do, and of each one that is done."""

    expect: Callable[[int], None] = lambda count: None
    done: Callable[[str], None] = lambda what: None


def check(
    targets: Sequence[Target], wanted: Wanted, device: torch.device, progress: Progress | None = None
) -> list[BuildReport]:
    """Run everything that is wanted on each build, in worker processes, and judge it."""
    progress = progress or Progress()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as workers:
        outputs = Outputs(pathlib.Path(folder)) if len(targets) > 1 else None
        teams = []
        for index, target in enumerate(targets):
            environment = target.given.environment(pathlib.Path(folder, f"build{index}"))

            def start(target: Target = target, environment: dict[str, str] = environment) -> Worker:
                worker = Worker(target.build.module, environment, device.type)
                workers.callback(worker.close)
                return worker

            shares = wanted.jobs // len(targets)
            asked = requests(index, wanted, outputs, probes=device.type == "cuda")
            teams.append(team(asked, wanted, shares, start))
        units = sorted(itertools.chain.from_iterable(own.units for own in teams), key=lambda unit: -unit.weight)
        progress.expect(sum(len(unit.requests) for unit in units))
        answers: list[tuple[Request, Answer | LostError]] = []
        for request, answer in ask_all(units, wanted.jobs):
            answers.append((request, answer))
            progress.done(request.get("case", request.get("name", "")))
        reports = _judged(targets, wanted, answers, outputs)
        if not wanted.speed or device.type != "cuda":
            return reports
        return [_with_speed(report, team, progress) for report, team in zip(reports, teams, strict=True)]


def _judged(
    targets: Sequence[Target],
    wanted: Wanted,
    answers: Sequence[tuple[Request, Answer | LostError]],
    outputs: Outputs | None,
) -> list[BuildReport]:
    outcomes: dict[tuple[int, str, str], Outcome] = {}
    probes: list[list[ProbeOutcome]] = [[] for _ in targets]
    for request, answer in answers:
        if request["do"] == "probe":
            probes[request["build"]].append(
                ProbeOutcome(request["name"], "raised", str(answer))
                if isinstance(answer, LostError)
                else ProbeOutcome(**answer)
            )
            continue
        case, backend = request["case"], request["backend"]
        outcomes[request["build"], case, backend] = (
            Outcome(case, backend, FAILED, str(answer)) if isinstance(answer, LostError) else Outcome(**answer)
        )

    def result(index: int, case: Case, backend: str) -> Result:
        outcome = outcomes[index, case.name, backend]
        verdict = judge(case, outcome, outcomes[index, case.name, CAUSAL])
        first = outcomes.get((0, case.name, backend))
        if index == 0 or outputs is None or first is None or {outcome.status, first.status} != {RAN}:
            return Result(case, outcome, verdict)
        agreement = outputs.compare(index, outcome, first)
        first_verdict = judge(case, first, outcomes[0, case.name, CAUSAL])
        return Result(case, outcome, judge_agreement(verdict, first_verdict, agreement), agreement)

    return [
        BuildReport(
            target.build,
            [result(index, case, path) for case, path in itertools.product(wanted.cases, wanted.paths(index))],
            [
                (outcome, judge_probe(outcome, target.build.defects, strict=wanted.strict))
                for outcome in sorted(probes[index], key=lambda outcome: list(PROBES).index(outcome.name))
            ],
        )
        for index, target in enumerate(targets)
    ]


def _with_speed(report: BuildReport, team: Team, progress: Progress) -> BuildReport:
    """Time what is right, one case at a time with nothing else running."""
    speeds: dict[tuple[str, str], Speed] = {}
    troubles = []
    right = list(_to_time(report, team))
    progress.expect(len(right))
    for case, backends in right:
        try:
            answer = team.timed[case].ask({"do": "time", "case": case, "backends": backends})
            speeds.update({(case, own["backend"]): Speed(**own) for own in answer["speeds"]})
        except LostError as lost:
            troubles.append(f"{case}: timing {', '.join(backends)}: {lost}")
        team.timed[case].close()
        progress.done(case)
    results = [
        dataclasses.replace(result, speed=speeds.get((result.case.name, result.outcome.backend)))
        for result in report.results
    ]
    return dataclasses.replace(report, results=results, troubles=troubles)


def _to_time(report: BuildReport, team: Team) -> Iterator[tuple[str, list[str]]]:
    """(case, its backends that are right and worth timing), where the causal call is right too."""
    for case in team.timed:
        right = [own.outcome.backend for own in report.results if own.case.name == case and own.verdict.status == OK]
        if CAUSAL in right:
            yield case, [name for name in right if name != REFERENCE]
