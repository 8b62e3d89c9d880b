"""All of a check on a GPU: the work is shared out to processes, judged, and what is right is timed."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.cudnn import Cudnn
from fa4_prefixlm.backends.flex import Flex
from fa4_prefixlm.backends.select import BACKENDS
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.fa4.builds.locate import GivenBuild
from fa4_prefixlm.tools.check.cases import CASES, Case
from fa4_prefixlm.tools.check.judge import (
    CAUSAL,
    FAILED,
    OK,
    RAN,
    Agreement,
    Outcome,
    ProbeOutcome,
    Speed,
    Verdict,
    compare,
    judge,
    judge_agreement,
    judge_probe,
)
from fa4_prefixlm.tools.check.probes import PROBES
from fa4_prefixlm.tools.check.workers import Answer, LostError, Request, Unit, Worker, ask_all

REFERENCE = "reference"
# What runs on a build, and the reference. The others are not FA4's: they say nothing of a build.
CHECKED = tuple(name for name in BACKENDS if name not in (Cudnn.name, Flex.name))


@dataclass(frozen=True)
class CheckedBuild:
    """A build to check: where it is, and what its source says of it."""

    given: GivenBuild
    build: Build


@dataclass(frozen=True)
class Wanted:
    """What to check. backends: names of `CHECKED`. strict: known defects fail too. jobs: processes at a time."""

    cases: Sequence[Case]
    backends: Sequence[str] = CHECKED
    speed: bool = True
    strict: bool = False
    jobs: int = 1

    def paths(self, index: int) -> list[str]:
        """What runs on a build: FA4's causal call, the others' peer, and the reference on the first build only."""
        return list(dict.fromkeys([CAUSAL, *(name for name in self.backends if name != REFERENCE or index == 0)]))


class Outputs:
    """Where the outputs of each build are kept until they are compared. Those of timed cases are too large to keep."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def file(self, index: int, case: str, backend: str) -> pathlib.Path | None:
        """Where one output is kept; None if it is not."""
        if CASES[case].timed:
            return None
        return self.folder / f"{index}-{list(CASES).index(case)}-{backend}.pt"

    def compare(self, index: int, one: Outcome, first: Outcome) -> Agreement:
        """How the outcomes of one case and backend on build `index` and on the first build compare."""
        if one.digest == first.digest:
            return Agreement(True)
        files = [self.file(build, one.case, one.backend) for build in (index, 0)]
        held = [torch.load(file) for file in files if file is not None]
        return compare(*held) if len(held) == 2 else Agreement(False)


def requests(index: int, wanted: Wanted, outputs: Outputs | None, *, probes: bool) -> list[Request]:
    """All that a build is asked. outputs: where to keep what it computes; None if it is not compared with another."""
    asked: list[Request] = [{"do": "probe", "build": index, "name": name} for name in PROBES if probes]
    for case, path in itertools.product(wanted.cases, wanted.paths(index)):
        file = outputs.file(index, case.name, path) if outputs is not None else None
        save = str(file) if file is not None else None
        asked.append({"do": "run", "build": index, "case": case.name, "backend": path, "save": save})
    return asked


@dataclass(frozen=True)
class Team:
    """The processes of a build. timed: by case, the process that has all its kernels."""

    units: Sequence[Unit]
    timed: Mapping[str, Worker]


# The heaviest start first: a timed case compiles a kernel of every backend in one process, the reference compiles none.
_TIMED, _KERNELS, _PROBE, _DENSE = 3, 2, 1, 0


def team(asked: Sequence[Request], wanted: Wanted, jobs: int, start: Callable[[], Worker]) -> Team:
    """Share the requests of a build out to processes; requests that share kernels go to the same one.

    A timed case goes to one process with all its backends, and each probe has a process of its own. The other cases of
    a backend are split over as many processes as `jobs` allows.
    """
    shards = max(1, jobs // len(wanted.paths(0)))
    kernels = list(dict.fromkeys(case.kernel for case in wanted.cases if not case.timed))
    shared: dict[tuple[int, str], list[Request]] = {}
    for request in asked:
        if request["do"] == "probe":
            key = (_PROBE, request["name"])
        elif CASES[request["case"]].timed:
            key = (_TIMED, request["case"])
        elif request["backend"] == REFERENCE:
            key = (_DENSE, REFERENCE)
        else:
            shard = kernels.index(CASES[request["case"]].kernel) % shards
            key = (_KERNELS, f"{request['backend']} {shard}")
        shared.setdefault(key, []).append(request)
    units = {
        (weight, name): Unit(start(), own, keep=weight == _TIMED, weight=weight)
        for (weight, name), own in shared.items()
    }
    timed = {name: unit.worker for (weight, name), unit in units.items() if weight == _TIMED}
    return Team(list(units.values()), timed)


# --- what comes of it ---


@dataclass(frozen=True)
class CaseResult:
    """One case on one backend. agreement: with the first build; None for that build, and where either did not run."""

    case: Case
    outcome: Outcome
    verdict: Verdict
    agreement: Agreement | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class BuildResults:
    """What came of one build, in the order of the cases and backends. troubles: what else failed."""

    build: Build
    results: Sequence[CaseResult] = ()
    probes: Sequence[tuple[ProbeOutcome, Verdict]] = ()
    troubles: Sequence[str] = ()

    @property
    def is_bad(self) -> bool:
        verdicts = [*(result.verdict for result in self.results), *(verdict for _, verdict in self.probes)]
        return bool(self.troubles) or any(verdict.is_bad for verdict in verdicts)


@dataclass(frozen=True)
class Progress:
    """Whom to tell how much more there is to do, and each thing that is done."""

    expect: Callable[[int], None] = lambda count: None
    done: Callable[[str], None] = lambda what: None


def check(
    builds: Sequence[CheckedBuild], wanted: Wanted, device: torch.device, progress: Progress | None = None
) -> list[BuildResults]:
    """Run everything that is wanted on each build, in worker processes, and judge it; in the order of `builds`."""
    progress = progress or Progress()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as workers:
        outputs = Outputs(pathlib.Path(folder)) if len(builds) > 1 else None
        teams = []
        for index, own in enumerate(builds):
            environment = own.given.environment(pathlib.Path(folder, f"build{index}"))

            def start(own: CheckedBuild = own, environment: dict[str, str] = environment) -> Worker:
                worker = Worker(own.build.module, environment, device.type)
                workers.callback(worker.close)
                return worker

            shares = wanted.jobs // len(builds)
            asked = requests(index, wanted, outputs, probes=device.type == "cuda")
            teams.append(team(asked, wanted, shares, start))
        units = sorted(itertools.chain.from_iterable(own.units for own in teams), key=lambda unit: -unit.weight)
        progress.expect(sum(len(unit.requests) for unit in units))
        answers: list[tuple[Request, Answer | LostError]] = []
        for request, answer in ask_all(units, wanted.jobs):
            answers.append((request, answer))
            progress.done(_said_of(request))
        judged = _judged(builds, wanted, answers, outputs)
        if not wanted.speed or device.type != "cuda":
            return judged
        return [_with_speed(own, team, progress) for own, team in zip(judged, teams, strict=True)]


def _said_of(request: Request) -> str:
    if request["do"] == "probe":
        return f"bare build, {request['name']}"
    return f"{request['case']}, {request['backend']}"


def _judged(
    builds: Sequence[CheckedBuild],
    wanted: Wanted,
    answers: Sequence[tuple[Request, Answer | LostError]],
    outputs: Outputs | None,
) -> list[BuildResults]:
    outcomes: dict[tuple[int, str, str], Outcome] = {}
    probes: list[list[ProbeOutcome]] = [[] for _ in builds]
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

    def result(index: int, case: Case, backend: str) -> CaseResult:
        outcome = outcomes[index, case.name, backend]
        verdict = judge(case, outcome, outcomes[index, case.name, CAUSAL])
        first = outcomes.get((0, case.name, backend))
        if index == 0 or outputs is None or first is None or {outcome.status, first.status} != {RAN}:
            return CaseResult(case, outcome, verdict)
        agreement = outputs.compare(index, outcome, first)
        first_verdict = judge(case, first, outcomes[0, case.name, CAUSAL])
        return CaseResult(case, outcome, judge_agreement(verdict, first_verdict, agreement), agreement)

    return [
        BuildResults(
            own.build,
            [result(index, case, path) for case, path in itertools.product(wanted.cases, wanted.paths(index))],
            [
                (outcome, judge_probe(outcome, own.build.defects, strict=wanted.strict))
                for outcome in sorted(probes[index], key=lambda outcome: list(PROBES).index(outcome.name))
            ],
        )
        for index, own in enumerate(builds)
    ]


def _with_speed(judged: BuildResults, team: Team, progress: Progress) -> BuildResults:
    """Time what is right, one case at a time with nothing else running."""
    speeds: dict[tuple[str, str], Speed] = {}
    troubles = []
    right = list(_to_time(judged, team))
    progress.expect(len(right))
    for case, backends in right:
        try:
            answer = team.timed[case].ask({"do": "time", "case": case, "backends": backends})
            speeds.update({(case, own["backend"]): Speed(**own) for own in answer["speeds"]})
        except LostError as lost:
            troubles.append(f"{case}: timing {', '.join(backends)}: {lost}")
        team.timed[case].close()
        progress.done(f"{case}, timed")
    results = [
        dataclasses.replace(result, speed=speeds.get((result.case.name, result.outcome.backend)))
        for result in judged.results
    ]
    return dataclasses.replace(judged, results=results, troubles=troubles)


def _to_time(judged: BuildResults, team: Team) -> Iterator[tuple[str, list[str]]]:
    """(case, its backends that are right and worth timing), where the causal call is right too."""
    for case in team.timed:
        right = [own.outcome.backend for own in judged.results if own.case.name == case and own.verdict.status == OK]
        if CAUSAL in right:
            yield case, [name for name in right if name != REFERENCE]
