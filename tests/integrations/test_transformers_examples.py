"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
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
