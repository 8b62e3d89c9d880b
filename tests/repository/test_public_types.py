"""mypy on `public_types.py`: what a user's type checker is told."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TYPES = "tests/repository/public_types.py"
MASKS_ARE_ANY = """
[[tool.mypy.overrides]]
module = "fa4_prefixlm.masks.*"
follow_imports = "skip"
"""

pytestmark = pytest.mark.slow
pytest.importorskip("mypy")


def mypy(config: pathlib.Path, cache: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(cache), TYPES]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_public_names_have_their_types() -> None:
    done = mypy(ROOT / "pyproject.toml", ROOT / ".mypy_cache")
    assert done.returncode == 0, done.stdout + done.stderr


def test_masks_that_became_any_are_noticed(tmp_path: pathlib.Path) -> None:
    """As where mypy does not find `fa4_prefixlm.masks`, which lies in a folder of another name."""
    config = tmp_path / "pyproject.toml"
    config.write_text((ROOT / "pyproject.toml").read_text() + MASKS_ARE_ANY)
    done = mypy(config, tmp_path / "cache")
    assert done.returncode != 0
    assert 'Expression is of type "Any", not "Tensor"' in done.stdout
    assert done.stdout.count('Unused "type: ignore" comment') == 4, done.stdout  # all but attention and plan
