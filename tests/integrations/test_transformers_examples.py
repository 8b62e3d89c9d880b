"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers", minversion="5.23")

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prefill(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("gemma_prefill").main(["--new-tokens", "3"]) < 1e-5
    tokens = [line.split("then")[1] for line in capsys.readouterr().out.splitlines() if "then" in line]
    assert len(tokens) == 2
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_finetune() -> None:
    """Packed rows, gradient checkpointing and Trainer: the losses of eager attention, and they fall."""
    pytest.importorskip("accelerate")
    module = example("finetune_gemma")
    losses = module.main(["--steps", "8"])
    assert losses == pytest.approx(module.train("eager", 8, checkpointing=False), rel=1e-3)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_benchmark(tmp_path: Path) -> None:
    """It verifies before it times, and keeps what it found."""
    file = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/transformers_models.py", "--tiny", "--rounds", "1", "--save", str(file)]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(file.read_text())["results"]
    ours = [own for own in results if own["attention"] == "fa4_prefixlm"]
    assert len(ours) == 2
    assert all(own["ms"] > 0 and own["error"] < 0.5 for own in ours)
