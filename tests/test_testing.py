"""fa4_prefixlm.testing: what tests, benchmarks and `check` stand on, with errors made by hand."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import subprocess

import pytest
import torch

from fa4_prefixlm.testing import machine, tables
from fa4_prefixlm.testing.bands import (
    SLACK,
    TYPICAL,
    WORST_CAUSAL,
    Errors,
    causal_limits,
    errors_of,
    largest_lse_error,
    limits,
    row_errors,
)
from fa4_prefixlm.testing.pages import NO_PAGE, SPARE_PAGES, shuffled_pages
from fa4_prefixlm.testing.poison import nan_output, poison_free_memory
from fa4_prefixlm.testing.timing import Timing, time_in_rounds

# --- pages ---


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_only_the_table_leads_to_the_keys(page_size: int) -> None:
    seqlens = (0, 1, 16, 70, 0, 129)
    k, v = (torch.randn(sum(seqlens), 2, dim, dtype=torch.bfloat16) for dim in (8, 4))
    own = shuffled_pages(k, v, seqlens, page_size, seed=3)
    named: list[int] = []
    first = 0
    for row, keys in zip(own.table, seqlens, strict=True):
        pages = row[: -(-keys // page_size)].long()
        named += pages.tolist()
        for cache, contiguous in ((own.k, k), (own.v, v)):
            flat = cache[pages].flatten(0, 1)
            assert torch.equal(flat[:keys], contiguous[first : first + keys])
            assert (flat[keys:] == 0).all(), "the unused rows of a last page must be finite"
        assert (row[len(pages) :] == NO_PAGE).all()
        first += keys
    assert len(named) == len(set(named)), "no page is two sequences'"
    assert named != sorted(named)
    spare = sorted(set(range(len(own.k))) - set(named))
    assert len(spare) == SPARE_PAGES
    assert own.k[spare].isnan().all()
    assert own.v[spare].isnan().all()


def test_pages_are_the_same_for_the_same_seed() -> None:
    k = v = torch.randn(300, 1, 4)
    one, same, other = (shuffled_pages(k, v, [300], 16, seed=seed) for seed in ("a name", "a name", "another"))
    assert torch.equal(one.table, same.table)
    assert torch.equal(one.k.nan_to_num(7.0), same.k.nan_to_num(7.0))
    assert one.table.shape != other.table.shape or not torch.equal(one.table, other.table)


# --- poison ---


def test_an_output_that_nobody_wrote_is_nan() -> None:
    q = torch.zeros(5, 3, 64, dtype=torch.float16)
    out = nan_output(q, 32)
    assert (out.shape, out.dtype) == ((5, 3, 32), torch.float16)
    assert out.isnan().all()
    poison_free_memory("cpu")  # nothing to poison there


@pytest.mark.gpu
def test_memory_that_is_handed_out_next_holds_nan() -> None:
    torch.cuda.empty_cache()  # of what other tests left
    poison_free_memory()
    for size in (300, 4096, 10**6):
        assert torch.empty(size, device="cuda").isnan().all()


# --- timing ---


def test_rounds_are_shuffled_and_led_in() -> None:
    events: list[str] = []

    def clock(run, calls: int) -> float:
        run()
        events.append(f"timed {calls}")
        return 2.0 if events[-2] == "slow" else 0.5

    calls = {name: lambda name=name: events.append(name) for name in ("slow", "fast")}
    timings = time_in_rounds(calls, rounds=5, round_ms=4.0, clock=clock)
    assert timings == {"slow": Timing(2.0, 0.0), "fast": Timing(0.5, 0.0)}
    in_rounds = events[4:]  # after a first look at how long each takes
    assert in_rounds.count("timed 2") == in_rounds.count("timed 8") == 5
    at = in_rounds.index("timed 8")
    assert in_rounds[at - 5 : at] == ["fast"] * 5, "4 calls before, and the one of the clock itself"
    timed = [event for event in in_rounds if event.startswith("timed")]
    rounds = [timed[at : at + 2] for at in range(0, 10, 2)]
    assert all(sorted(own) == ["timed 2", "timed 8"] for own in rounds)
    assert len({tuple(own) for own in rounds}) == 2, "not always in the same order"


def test_a_time_is_the_median_and_its_spread() -> None:
    assert Timing.of([1.0, 9.0, 2.0]) == Timing(2.0, 4.0)


# --- tables ---


def test_columns() -> None:
    rows = [("a", "", "number"), ("long name", "", "7")]
    assert tables.columns(rows) == ["a          number", "long name  7"]
    assert tables.columns(rows, right=[2]) == ["a          number", "long name       7"]
    assert tables.columns([]) == []
    assert tables.titled("title", ["x", "y"]) == "title\n  x\n  y"
    assert tables.markdown(["", "b"], [["1", "2"]]) == ["|  | b |", "| --- | --- |", "| 1 | 2 |"]


# --- machine ---


def test_the_machine_as_facts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine.describe_machine().facts()
    assert facts["torch"] == torch.__version__
    assert set(facts) >= {"python", "CUDA of torch", "GPUs", "fa4_prefixlm"}
    assert str(pathlib.Path.home()) not in str(facts)
    for text in (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 24\nGCC version:  gcc 12.2.0\n",
    ):
        (tmp_path / "version").write_text(text)
        monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
        assert machine.describe_machine().driver == "570.86.15"
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "nothing")
    assert machine.describe_machine().driver is None
    gpus = tuple(machine.Gpu("A GPU", arch) for arch in ("sm_90", "sm_80"))
    assert dataclasses.replace(machine.describe_machine(), gpus=gpus).facts()["GPUs"] == "A GPU (sm_90), A GPU (sm_80)"


def test_the_commit_is_that_of_this_checkout(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    root = pathlib.Path(machine.__file__).parents[2]
    if (root / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        found = machine.commit()
        assert found is not None
        assert head.stdout.startswith(found.removesuffix("-dirty"))
    # Installed in an environment that lies in somebody else's repository.
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "lib" / "site" / "fa4_prefixlm" / "testing" / "machine.py"))
    assert machine.commit() is None
    monkeypatch.setenv("COMMIT", "given")
    assert machine.commit() == "given"


# --- bands ---


def test_a_single_row_shows() -> None:
    exact = torch.randn(1000, 4, 64, dtype=torch.float64)
    exact[7, 1] = 0
    out = exact.clone()
    assert row_errors(out, exact).max() == 0
    out[500, 2] *= 1.05
    assert row_errors(out, exact).flatten().argmax() == 500 * 4 + 2
    out[7, 1, 3] = 1e-6
    assert row_errors(out, exact)[7, 1] == math.inf
    out[9, 0, 0] = math.nan
    assert row_errors(out, exact)[9, 0] == math.inf


def test_the_error_of_an_lse() -> None:
    exact = torch.tensor([[1.0, -math.inf]], dtype=torch.float64)
    assert largest_lse_error(exact.float(), exact) == 0
    assert largest_lse_error(torch.tensor([[1.5, -math.inf]]), exact) == 0.5
    assert largest_lse_error(torch.tensor([[1.0, 0.0]]), exact) == math.inf
    assert largest_lse_error(torch.tensor([[math.nan, -math.inf]]), exact) == math.inf
    assert largest_lse_error(torch.empty(2, 0), torch.empty(2, 0)) == 0


def test_errors_of_an_output() -> None:
    exact, lse = torch.randn(10, 2, 8, dtype=torch.float64), torch.randn(2, 10, dtype=torch.float64)
    out = exact.clone()
    out[3, 1] *= 1.1
    found = errors_of(out, lse + 0.25, exact, lse)
    assert found.row_error == pytest.approx(0.1)
    assert 0 < found.error < 0.1
    assert found.lse_error == pytest.approx(0.25)
    nothing = torch.empty(0, 2, 8)
    assert errors_of(nothing, torch.empty(2, 0), nothing, torch.empty(2, 0)) == Errors(0.0, 0.0, 0.0)


def test_limits_are_made_of_the_causal_call() -> None:
    typical = TYPICAL["bfloat16"]
    usual = Errors(*(getattr(typical, own) * getattr(SLACK, own) for own in ("error", "row_error", "lse_error")))
    assert limits("bfloat16", None) == usual
    assert limits("bfloat16", Errors(0.0, 0.0, 0.0)) == usual, "a batch of one token has no error"
    assert limits("bfloat16", Errors(math.nan, math.nan, math.nan)) == usual
    assert limits("bfloat16", typical * 2) == usual * 2
    assert limits("bfloat16", typical * 1000) == usual * WORST_CAUSAL, "a causal call that is wrong is no band"
    assert causal_limits("bfloat16") == typical * WORST_CAUSAL
    assert limits("float16", None).error == limits("bfloat16", None).error / 8
