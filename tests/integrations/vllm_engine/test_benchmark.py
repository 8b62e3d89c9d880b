"""The benchmark of the engine, tiny, on the CPU: a GPU's time is too dear to find there that it does not run."""

from __future__ import annotations

import json
import pathlib
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("what", ["exact", "time"])
def test_it_runs(what: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "results.json"
    options = shlex.split("--cpu V1 --modes eager --models gemma3 --seconds 0 --backends FA4_PREFIXLM_ALL")
    options += ["FA4_PREFIXLM_ALL:again"] if what == "time" else []
    command = [sys.executable, "benchmarks/vllm_engine.py", what, *options, "--save", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(file.read_text())["results"]
    if what == "exact":
        assert [row["backend"] for row in rows] == ["FA4_PREFIXLM_ALL"]
        assert rows[0]["counts"]["steps with images"] > 0
        return
    assert {row["workload"].partition(",")[0] for row in rows} == {"first token", "decode", "GPU", "host"}
    assert all(row["rounds"] == 3 for row in rows)
    calls = {row["backend"]: row["calls of functions a step"] for row in rows if row["workload"].startswith("decode")}
    assert calls["FA4_PREFIXLM_ALL"] == calls["FA4_PREFIXLM_ALL:again"] > 0
    measured = {name for row in rows for name in row if name.endswith(("ms", "a step", "tokens/s"))}
    units = {"ms", "tokens/s", "fastest steps, us a step", "calls of functions a step"}
    units |= {"prefill, ms", "decoding, us a step"}
    assert units | {"mixed: builders, us a step"} <= measured
