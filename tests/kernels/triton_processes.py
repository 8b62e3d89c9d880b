"""Triton interpreted, in a process of its own, and compiled without a GPU."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")
import triton

ROOT = pathlib.Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# CI's machine has two cores, and the interpreter takes long: it gets a third of the random cases, of every seed.
THOROUGH = os.environ.get("FA4_PREFIXLM_THOROUGH") == "1"


def random_cases(thorough: int) -> int:
    """How many to try, where `FA4_PREFIXLM_THOROUGH=1` tries so many."""
    return thorough if THOROUGH else -(-thorough // 3)


def run_interpreted(file: str, *options: str) -> None:
    """Run the tests of `file` in a process where Triton interprets. options: of pytest."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def compile_for_hopper(kernel, pointers: dict[str, str], constants: dict[str, object], aligned=()) -> str:
    """PTX of a kernel for sm_90, without a GPU. Arguments that are neither pointers nor constants are int32.

    aligned: names of those that are divisible by 16.
    """
    from triton.backends.compiler import GPUTarget

    kinds = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
