"""The examples run, and do what they say."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def benchmark(name: str) -> ModuleType:
    sys.path.insert(0, str(EXAMPLES.parent / "benchmarks"))
    return importlib.import_module(name)


def test_prefill(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("gemma_prefill").main(["--new-tokens", "3"]) < 1e-5
    tokens = [line.split("then")[1] for line in capsys.readouterr().out.splitlines() if "then" in line]
    assert len(tokens) == 2
    assert tokens[0] == tokens[1]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["gemma_prefill.py --new-tokens 1", "finetune_gemma.py --steps 1"])
def test_by_itself(arguments: str) -> None:
    """In a process in which nothing else has registered this library with transformers."""
    if arguments.startswith("finetune"):
        pytest.importorskip("accelerate")
    file, *options = arguments.split()
    command = [sys.executable, EXAMPLES / file, *options]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


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
    assert all(own["ms"] > 0 and own["error"] < 0.05 and own["dropped"] > 0.2 for own in ours)
    floor = [own for own in results if own["attention"] == "no attention"]
    assert len(floor) == 2
    assert all(own["ms"] > 0 and own["error"] is None for own in floor)


def test_benchmark_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut off, in the second of four, has the first in its file."""
    module, file = benchmark("transformers_models"), tmp_path / "results.json"
    done: list[str] = []

    def measure(stack: Any, work: str, tokens: int, attentions: list[str], **rest: Any) -> list[Any]:
        if done:
            raise KeyboardInterrupt
        done.append(work)
        return [module.Result(stack.name, work, tokens, name, ms=1.0, spread=0.0) for name in attentions]

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["x", "--tiny", "--work", "prefill", "training step", "--save", str(file)])
    with pytest.raises(KeyboardInterrupt):
        module.main()
    kept = json.loads(file.read_text())
    assert kept["transformers"]
    assert [(own["work"], own["attention"]) for own in kept["results"]] == [("prefill", a) for a in module.ATTENTIONS]
    assert [own.name for own in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("errors", "dropped", "timed", "notes"),
    [
        ((0.01, 0.0124, 0.0126), 0.031, ["sdpa", "flex_attention"], ["", "", "WRONG"]),
        ((0.01, float("nan"), None), 0.031, ["sdpa"], ["", "WRONG", ""]),
        ((0.6, 0.6, 0.6), 0.9, [], ["NOT TOLD FROM WRONG"] * 3),  # bfloat16 itself is too far off
        ((0.01, 0.01, 0.01), float("nan"), [], ["NOT TOLD FROM WRONG"] * 3),
        ((None, 0.01, 0.01), None, [], [""] * 3),  # nothing to hold them against
    ],
)
def test_benchmark_times_what_it_knows_to_be_right(
    errors: tuple[float | None, ...], dropped: float | None, timed: list[str], notes: list[str]
) -> None:
    module = benchmark("transformers_models")
    results = {
        name: module.Result("a stack", "prefill", 8192, name, error=error)
        for name, error in zip(module.ATTENTIONS, errors, strict=True)
    }
    assert module.right(results, dropped) == timed
    assert [own.note.partition(":")[0] for own in results.values()] == notes


def test_benchmark_says_what_is_out_of_reach() -> None:
    module = benchmark("transformers_models")

    def lines(times: dict[str, float]) -> list[str]:
        stack = module.STACKS[0].name
        return module.targets([module.Result(stack, "prefill", 16384, name, ms=ms) for name, ms in times.items()])

    missed = {"sdpa": 121.0, "flex_attention": 67.0, "fa4_prefixlm": 64.0}
    assert lines(missed) == [
        "MISSED: 1.05x as fast as flex_attention at 16384, wanted 1.15x",
        "MISSED: 1.89x as fast as sdpa at 16384, wanted 2.0x",
    ]
    assert lines({**missed, "no attention": 60.0}) == [
        "out of reach for any attention: 1.05x as fast as flex_attention at 16384, wanted 1.15x, no attention 1.12x",
        "MISSED: 1.89x as fast as sdpa at 16384, wanted 2.0x, no attention 2.02x",
    ]
    beside = lines({**missed, "FA4, images dropped": 61.0, "no attention": 60.0})
    assert beside[1].endswith("wanted 2.0x, FA4, images dropped 1.98x, no attention 2.02x")
    assert lines({**missed, "fa4_prefixlm": 58.0, "no attention": 60.0})[0].startswith("reached: 1.16x")


def test_the_floor_of_the_benchmark() -> None:
    """Values of the right shape, and gradients for all that comes before."""
    module = benchmark("transformers_models")
    q, k, v = (torch.randn(2, heads, 5, 4, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    out, weights = module.values_alone(torch.nn.Module(), q, k, v, None, scaling=1.0)
    assert weights is None
    assert torch.equal(out, v.repeat_interleave(3, dim=1).transpose(1, 2))
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert torch.equal(grads[0], torch.zeros_like(q))
    assert torch.equal(grads[1], torch.zeros_like(k))
    torch.testing.assert_close(grads[2], 6 * v)


def test_tables_show_the_floor_beside_the_attentions() -> None:
    module = benchmark("engine_tables")

    def row(attention: str, ms: float | None, **more: Any) -> dict[str, Any]:
        return {"stack": "A", "work": "prefill", "tokens": 8, "attention": attention, "ms": ms, "peak_mib": 9.0} | more

    rows = [row("sdpa", 2.0), row("no attention", 1.0), row("fa4_prefixlm", None)]
    others = [row("sdpa", 7.0, work="training step"), row("sdpa", 8.0, stack="B")]
    assert module.stack_table(rows + others).splitlines() == [
        "| tokens | sdpa | fa4_prefixlm | no attention (the floor) |",
        "| --- | --- | --- | --- |",
        "| 8 | 2.0 ms, 9 MiB | not timed | 1.0 ms, 9 MiB |",
    ]
