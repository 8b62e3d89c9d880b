"""Check FA4 builds: every backend on every case against float64, in the error band of FA4's own causal call.

Also what a build does by itself when it is called unwarily, whether builds agree, and how fast each backend is. With a
path to a checkout of a fork (its `flash_attn/cute`), checks that fork without installing it. Where there is no GPU, the
kernels are compiled and not run. Exit status: 0 all right, 1 something is wrong, 2 nothing could be checked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from fa4_prefixlm.backends.select import BACKENDS
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.fa4.build.locate import all_installed, given
from fa4_prefixlm.tools.check.cases import cases
from fa4_prefixlm.tools.check.crosscheck import crosscheck
from fa4_prefixlm.tools.check.report import Report
from fa4_prefixlm.tools.check.session import Progress, check
from fa4_prefixlm.tools.check.work import Target, Wanted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--build",
        action="append",
        default=[],
        metavar="MODULE_OR_PATH",
        help="check this FA4 (a module, or a checkout of flash_attn/cute), others against the first one; "
        "default: all that are installed",
    )
    parser.add_argument("--full", action="store_true", help="all cases, not just those of about a minute")
    parser.add_argument(
        "--backend", action="append", default=[], choices=tuple(BACKENDS), help="only this one, beside FA4's causal"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--no-speed", action="store_true", help="do not time anything")
    parser.add_argument("--strict", action="store_true", help="known defects of the bare build fail too")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--junit", type=pathlib.Path, metavar="FILE", help="write JUnit XML here")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes at a time; default: the CPU cores"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def main(arguments: argparse.Namespace) -> int:
    """The exit status; the report goes to stdout."""
    try:
        targets, wanted = _read(arguments)
    except InputError as error:
        print(f"fa4-prefixlm check: {error}", file=sys.stderr)
        return 2
    on_gpu = torch.cuda.is_available()
    with _progress(quiet=arguments.quiet) as progress:
        if on_gpu:
            builds = check(targets, wanted, torch.device("cuda"), progress)
        else:
            builds = crosscheck(targets, wanted, progress)
    report = Report("full" if arguments.full else "quick", on_gpu, builds)
    print(report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if arguments.junit is not None:
        arguments.junit.write_text(report.as_junit())
    if report.is_bad:
        return 1
    return 2 if report.is_empty else 0


def _read(arguments: argparse.Namespace) -> tuple[list[Target], Wanted]:
    """What to check. Raises `InputError`."""
    chosen = cases(full=arguments.full, containing=arguments.case)
    if not chosen:
        raise InputError("--case", "part of the name of a case" + " (or --full)" * (not arguments.full), arguments.case)
    if arguments.jobs < 1:
        raise InputError("--jobs", "at least 1", arguments.jobs)
    for name, file in (("--json", arguments.json), ("--junit", arguments.junit)):
        if file is not None and not file.absolute().parent.is_dir():
            raise InputError(name, "a file in a folder that there is", file)
    return _targets(arguments.build), Wanted(
        chosen,
        [name for name in BACKENDS if not arguments.backend or name in arguments.backend],
        speed=not arguments.no_speed,
        strict=arguments.strict,
        jobs=arguments.jobs,
    )


def _targets(texts: list[str]) -> list[Target]:
    found = [given(text) for text in texts or [build.module for build in all_installed()]]
    if not found:
        raise InputError("--build", "an installed FA4, or a checkout of one", "none")
    return [Target(own, own.describe()) for own in found]


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress]:
    """A bar on stderr, if that is a terminal."""
    with tqdm(total=0, unit="case", disable=True if quiet else None, leave=False, file=sys.stderr) as bar:

        def expect(count: int) -> None:
            bar.total += count
            bar.refresh()

        def done(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        yield Progress(expect, done)


def run(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fa4-prefixlm check", description=__doc__)
    add_arguments(parser)
    return main(parser.parse_args(argv))
