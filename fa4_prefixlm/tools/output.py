"""`--json [FILE]`, alike for every command: JSON in place of the report, or beside it in a file."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from fa4_prefixlm.errors import InputError

STDOUT = "-"


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Let a command take `--json [FILE]`."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="print JSON in place of the report; with a FILE other than -, print the report and write JSON to the file",
    )


def check_file(option: str, file: str | pathlib.Path | None) -> None:
    """Raise `InputError` before any work is done if a file could not be written, because its folder does not exist."""
    if file is not None and str(file) != STDOUT and not pathlib.Path(file).absolute().parent.is_dir():
        raise InputError(option, "a file in an existing folder", file)


def print_report(report: object, content: Mapping[str, Any], file: str | None) -> None:
    """Print the report or its JSON, as `--json` says."""
    text = json.dumps(content, indent=1)
    if file is not None and file != STDOUT:
        pathlib.Path(file).write_text(text + "\n")
    try:
        print(text if file == STDOUT else report, flush=True)
    except BrokenPipeError:  # the reader has seen enough (`| head`); Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
