"""The command `fa4-prefixlm`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fa4_prefixlm.testing.machine import versions
from fa4_prefixlm.tools import doctor, warmup
from fa4_prefixlm.tools.check import command as check


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fa4-prefixlm", description="Exact PrefixLM attention on FlashAttention-4.")
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {versions().get('fa4_prefixlm', 'not installed')}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module, what in (
        ("doctor", doctor, "say what a call takes here and why; show the FA4 builds found and what each can do"),
        ("check", check, "check that the FA4 builds compute these masks right, against float64"),
        ("warmup", warmup, "compile the kernels of a model's layers into the cache on disk"),
    ):
        own = commands.add_parser(name, help=what, description=module.__doc__)
        module.add_arguments(own)
        own.set_defaults(run=module.main)
    arguments = parser.parse_args(argv)
    result: int = arguments.run(arguments)
    return result
