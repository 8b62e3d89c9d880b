"""Which work there is, and which process does which part of it."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.select import BACKENDS
from fa4_prefixlm.fa4.build.describe import Build
from fa4_prefixlm.fa4.build.locate import GivenBuild
from fa4_prefixlm.tools.check.cases import CASES, Case
from fa4_prefixlm.tools.check.judge import Agreement, compare
from fa4_prefixlm.tools.check.outcomes import CAUSAL, Outcome
from fa4_prefixlm.tools.check.pool import Request, Unit, Worker
from fa4_prefixlm.tools.check.probes import PROBES

REFERENCE = "reference"


@dataclass(frozen=True)
class Target:
    """A build to check: where it is, and what its source says of it."""

    given: GivenBuild
    build: Build


@dataclass(frozen=True)
class Wanted:
    """What to check. backends: names of `BACKENDS`. strict: known defects fail too. jobs: processes at a time."""

    cases: Sequence[Case]
    backends: Sequence[str] = tuple(BACKENDS)
    speed: bool = True
    strict: bool = False
    jobs: int = 1

    def paths(self, index: int) -> list[str]:
        """What runs on a build: FA4's causal call, which is the peer of the others, and the reference only once."""
        return list(dict.fromkeys([CAUSAL, *(name for name in self.backends if name != REFERENCE or index == 0)]))


class Outputs:
    """Where the outputs of each build are kept until they are compared. Not of timed cases, which are large."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def file(self, index: int, case: str, backend: str) -> pathlib.Path | None:
        if CASES[case].timed:
            return None
        return self.folder / f"{index}-{list(CASES).index(case)}-{backend}.pt"

    def compare(self, index: int, one: Outcome, first: Outcome) -> Agreement:
        """Two outcomes of one case and backend, of build `index` and of the first."""
        if one.digest == first.digest:
            return Agreement(True)
        files = [self.file(build, one.case, one.backend) for build in (index, 0)]
        held = [torch.load(file) for file in files if file is not None]
        return compare(*held) if len(held) == 2 else Agreement(False)


def requests(index: int, wanted: Wanted, outputs: Outputs | None, *, probes: bool) -> list[Request]:
    """All that a build is asked. outputs: where to keep what it computes, None if it is compared with no other."""
    asked: list[Request] = [{"do": "probe", "build": index, "name": name} for name in PROBES if probes]
    for case, path in itertools.product(wanted.cases, wanted.paths(index)):
        file = outputs.file(index, case.name, path) if outputs is not None else None
        save = str(file) if file is not None else None
        asked.append({"do": "run", "build": index, "case": case.name, "backend": path, "save": save})
    return asked


@dataclass(frozen=True)
class Team:
    """The processes of a build. timed: by case, the one that has all its kernels."""

    units: Sequence[Unit]
    timed: Mapping[str, Worker]


# Which units start first: a timed case compiles a kernel of every backend, in one process. The reference compiles none.
_TIMED, _KERNELS, _PROBE, _DENSE = 3, 2, 1, 0


def team(asked: Sequence[Request], wanted: Wanted, jobs: int, start: Callable[[], Worker]) -> Team:
    """Give the requests of a build to processes, those that share kernels to the same one.

    A timed case on every backend is one process's, and each probe. The other cases of a backend are split over as many
    processes as there are `jobs` for.
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
