"""Check FA4 builds: every backend on every case against float64, in the error band of FA4's own causal call.

Also what a build does by itself when it is called unwarily, whether builds agree, and how fast each backend is. With a
path to a checkout of a fork (its `flash_attn/cute`), checks that fork without installing it. Where there is no GPU, the
kernels are compiled and not run. Exit status: 0 all right, 1 something is wrong or does not compile, 2 no output of
FlashAttention-4 was judged (no GPU, or every case was refused).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import threading
from collections.abc import Iterator

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from fa4_prefixlm.errors import InputError, install_hint
from fa4_prefixlm.fa4.builds.locate import all_installed, given
from fa4_prefixlm.tools.check.cases import cases
from fa4_prefixlm.tools.check.crosscheck import crosscheck
from fa4_prefixlm.tools.check.report import CheckReport
from fa4_prefixlm.tools.check.session import CHECKED, REFERENCE, CheckedBuild, Progress, Wanted, check
from fa4_prefixlm.tools.output import add_json_argument, check_file, print_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--build",
        action="append",
        default=[],
        metavar="MODULE_OR_PATH",
        help="check this FA4 (a module, or a checkout of flash_attn/cute), others against the first one; "
        "default: all that are installed",
    )
    parser.add_argument("--full", action="store_true", help="all cases, not only those that take about a minute")
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        choices=CHECKED,
        help="only this backend, beside FA4's causal call; may be given several times",
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--no-speed", action="store_true", help="do not time anything")
    parser.add_argument("--strict", action="store_true", help="known defects of the bare build fail too")
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="compile the kernels for Hopper and run nothing, GPU or not; exit status 0 if all of them compile",
    )
    add_json_argument(parser)
    parser.add_argument("--junit", type=pathlib.Path, metavar="FILE", help="write JUnit XML to this file")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes at a time; default: the CPU cores"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def main(arguments: argparse.Namespace) -> int:
    """The exit status; the report goes to stdout."""
    try:
        builds, wanted = _read(arguments)
    except InputError as error:
        print(f"fa4-prefixlm check: {error}", file=sys.stderr)
        return 2
    with _progress(quiet=arguments.quiet) as progress:
        if torch.cuda.is_available() and not arguments.compile_only:
            results = check(builds, wanted, torch.device("cuda"), progress)
        else:
            results = crosscheck(builds, wanted, progress)
    report = CheckReport("full" if arguments.full else "quick", results, compile_only=arguments.compile_only)
    print_report(report, report.as_json(), arguments.json)
    if arguments.junit is not None:
        arguments.junit.write_text(report.as_junit())
    return report.exit_status


def _read(arguments: argparse.Namespace) -> tuple[list[CheckedBuild], Wanted]:
    """What to check. Raises `InputError`."""
    chosen = cases(full=arguments.full, containing=arguments.case)
    if not chosen:
        raise InputError("--case", "part of the name of a case" + " (or --full)" * (not arguments.full), arguments.case)
    if arguments.jobs < 1:
        raise InputError("--jobs", "at least 1", arguments.jobs)
    check_file("--json", arguments.json)
    check_file("--junit", arguments.junit)
    backends = [name for name in CHECKED if not arguments.backend or name in arguments.backend]
    return _builds(arguments.build), Wanted(
        chosen,
        [name for name in backends if name != REFERENCE] if arguments.compile_only else backends,
        speed=not arguments.no_speed,
        strict=arguments.strict,
        jobs=arguments.jobs,
    )


def _builds(texts: list[str]) -> list[CheckedBuild]:
    found = [given(text) for text in texts or [build.module for build in all_installed()]]
    if not found:
        raise InputError("--build", "an installed FA4, or a checkout of one", f"none ({install_hint('fa4')})")
    return [CheckedBuild(own, own.describe()) for own in found]


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress]:
    """On stderr: a bar in a terminal, elsewhere a line for each thing that is done."""
    lines = not quiet and not sys.stderr.isatty()
    lock = threading.Lock()  # kernels are compiled by several threads
    with tqdm(total=0, unit="case", disable=quiet or lines, leave=False, file=sys.stderr) as bar:
        finished = 0

        def expect(count: int) -> None:
            with lock:
                bar.total += count
                bar.refresh()

        def done(what: str) -> None:
            nonlocal finished
            with lock:
                finished += 1
                bar.set_postfix_str(what, refresh=False)
                bar.update()
                if lines:
                    print(f"[{finished}/{bar.total}] {what}", file=sys.stderr, flush=True)

        yield Progress(expect, done)


def run(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fa4-prefixlm check", description=__doc__)
    add_arguments(parser)
    return main(parser.parse_args(argv))
