"""The rooms of the package: names that can't be mistaken, imports that point one way."""

from __future__ import annotations

import ast
import fnmatch
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import fa4_prefixlm

ROOT = pathlib.Path(__file__).parents[2]
# `fa4_prefixlm/masks` is a link, which rglob does not follow.
MODULES = sorted({*(ROOT / "fa4_prefixlm").rglob("*.py"), *(ROOT / "masks").rglob("*.py")})
LINT = "from importlinter.cli import lint_imports_command as lint; lint()"


def by_name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def roots_imported(source: str) -> list[int]:
    """Lines that import the root package itself, whose `__init__` is still being run by then."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Import) and any(own.name == "fa4_prefixlm" for own in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "fa4_prefixlm" and node.level == 0)
        or (isinstance(node, ast.ImportFrom) and node.level > 0)
    ]


def test_no_module_has_the_name_of_something_exported() -> None:
    """`from fa4_prefixlm import plan` is the function, whatever was imported before."""
    names = {path.parent.name if path.stem == "__init__" else path.stem for path in MODULES}
    assert names & set(fa4_prefixlm.__all__) == set()
    assert {"plans", "public_call", "prefix_lm", "masks"} <= names


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_no_module_imports_the_root_package(path: pathlib.Path) -> None:
    assert roots_imported(path.read_text()) == []


def test_imports_of_the_root_package_are_seen() -> None:
    assert roots_imported("def f():\n    import fa4_prefixlm as fp") == [2]
    assert roots_imported("from fa4_prefixlm import Mask\nfrom . import lengths\nfrom .batch import keys") == [1, 2, 3]
    assert roots_imported("import fa4_prefixlm.masks\nfrom fa4_prefixlm.masks import causal") == []


def test_pytest_leaves_no_room_out(pytestconfig: pytest.Config) -> None:
    """It does not look into folders of some names, `build` for one."""
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    patterns = pytestconfig.getini("norecursedirs")
    assert [name for name in folders if any(fnmatch.fnmatch(name, own) for own in patterns)] == []
    assert {"builds", "kernels", "models"} <= folders


def lint(folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", LINT, "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_an_import_that_points_up_breaks_a_contract(tmp_path: pathlib.Path) -> None:
    """In a copy. That the contracts hold is `make check`'s to say; here, that they would not."""
    pytest.importorskip("importlinter")
    shutil.copytree(ROOT / "fa4_prefixlm", tmp_path / "fa4_prefixlm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    whole = lint(tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    for module, line, contract in (
        ("batch/options.py", "from fa4_prefixlm.runtime import plans", "Imports point one way"),
        ("geometry/tiles.py", "def f():\n    import fa4_prefixlm.backends.select", "Imports point one way"),
        ("runtime/plans.py", "import cutlass", "Only fa4/ knows FlashAttention-4"),
        ("backends/native.py", "def f():\n    import triton", "Only kernels/ knows Triton"),
    ):
        file = tmp_path / "fa4_prefixlm" / module
        text = file.read_text()
        file.write_text(f"{text}\n\n{line}\n")
        broken = lint(tmp_path)
        file.write_text(text)
        assert broken.returncode != 0, f"{module}: {line}"
        assert any(contract in own and "BROKEN" in own for own in broken.stdout.splitlines()), broken.stdout
