"""The package as it is installed."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def in_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


def test_import_is_light() -> None:
    heavy = in_fresh_process(
        "import sys, fa4_prefixlm; "
        "print([name for name in ('cutlass', 'triton', 'flash_attn', 'PIL') if name in sys.modules])"
    )
    assert heavy.strip() == "[]"


@pytest.mark.slow
def test_running_the_reference_imports_no_cutlass() -> None:
    loaded = in_fresh_process(
        "import sys, torch, fa4_prefixlm as fp; x = torch.randn(1, 9, 2, 8); fp.attention(x, x, x, [[(2, 5)]]);"
        "print('cutlass' in sys.modules)"
    )
    assert loaded.strip() == "False"


@pytest.mark.slow
def test_masks_come_from_the_top_level_folder_in_an_editable_install() -> None:
    path = in_fresh_process("import fa4_prefixlm.masks as m; print(m.__file__)").strip()
    assert pathlib.Path(path).resolve() == ROOT / "masks" / "__init__.py"


@pytest.mark.slow
def test_the_wheel_holds_the_masks_and_the_types(tmp_path: pathlib.Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {"fa4_prefixlm/masks/__init__.py", "fa4_prefixlm/masks/prefix_lm.py", "fa4_prefixlm/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "masks", "benchmarks", "examples"))]
    wanted = {
        f"fa4_prefixlm/{path.relative_to(ROOT / 'fa4_prefixlm')}" for path in (ROOT / "fa4_prefixlm").rglob("*.py")
    }
    assert wanted <= names
