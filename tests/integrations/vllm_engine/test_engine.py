"""vLLM on this library, on the CPU: logprobs of all positions and the whole vocabulary against transformers."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.integrations.vllm_engine import engine, models, oracle
from tests.integrations.vllm_engine.engine import ROUNDS, Job

pytestmark = pytest.mark.slow
TOGETHER, CACHED, ALONE, ZEROED, DROPPED, UNCAPPED = ROUNDS
LIMITS = {"gemma3": 1e-4, "gemma4": 1e-2, "paligemma2": 1e-4}
SEEN = 0.1  # what an attention that is wrong is off, at least
WINDOW = 48
# A checkpoint's folder and its shape. This Gemma 4 has two layers without a cache of their own, and images that are
# longer than its window. Gemma 4 cuts these; in vLLM's Gemma 3 and PaliGemma 2 they are none.
SHAPES: dict[str, dict[str, Any]] = {
    "gemma3": {},
    "gemma4": {"layers": 6, "kv_shared": 2, "window": WINDOW},
    "paligemma2": {},
    "gemma3-narrow": {"window": WINDOW},
    "paligemma2-narrow": {"window": WINDOW},
}
# Model runner V2 is slow here: its kernels run in Triton's interpreter.
CASES = {
    ("gemma3", "V2"): (TOGETHER, CACHED),
    ("gemma4", "V2"): (TOGETHER, CACHED),
    ("paligemma2", "V2"): (TOGETHER, CACHED),
    ("gemma3", "V1"): ROUNDS[:5],
    ("gemma4", "V1"): ROUNDS[:5],
    ("paligemma2", "V1"): ROUNDS,
    ("gemma3-narrow", "V1"): (TOGETHER,),
    ("paligemma2-narrow", "V1"): (TOGETHER,),
}
# Tensor parallel: each process has half of the heads. Its counts are those of its own processes, and not seen here.
RANKS = "two ranks"
PARALLEL = {(name, RANKS): (TOGETHER, CACHED) for name in ("gemma3", "gemma4")}
EXACT = [case for case in CASES if case[0] in LIMITS]
RIGHT = [(*case, name) for case in EXACT for name in CASES[case] if name in ROUNDS[:3]]
RIGHT += [(*case, name) for case, rounds in PARALLEL.items() for name in rounds]

Answers = dict[str, tuple[list[int], torch.Tensor, int, int]]


@dataclasses.dataclass(frozen=True)
class Ran:
    """A job that ran. saved: what `engine.run` returned."""

    job: Job
    saved: dict[str, Any]

    def errors(self, name: str, *, spans: bool = True) -> dict[str, float]:
        """By prompt, the largest error of a logprob. spans: of an oracle that knows them."""
        found = {}
        for prompt, (tokens, rows, first, _) in self.saved["rounds"][name].items():
            assert rows.shape[1] == models.VOCABULARY
            assert not rows.isnan().any(), "the engine left out a part of the vocabulary"
            assert len(rows) == len(tokens) - first
            right = _right(self.job.folder, prompt, tuple(tokens[:-1]), spans, self.job)[first - 1 :]
            found[prompt] = float((rows - right).abs().max())
        return found

    @functools.cached_property
    def with_images(self) -> set[str]:
        """Prompts that have some."""
        return {name for name, (_, images) in engine.prompts(self.job).items() if images}


@functools.lru_cache(maxsize=256)
def _right(folder: str, prompt: str, tokens: tuple[int, ...], spans: bool, job: Job) -> torch.Tensor:
    return oracle.expected(folder, list(tokens), engine.prompts(job)[prompt][1], spans=spans)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Ran]:
    folder: pathlib.Path = tmp_path_factory.mktemp("vllm")
    jobs = {}
    for (name, runner), rounds in {**CASES, **PARALLEL}.items():
        if not (folder / name).exists():
            models.make(name.partition("-")[0], folder / name, **SHAPES[name])
        # Budgets below the longest prompts, so that they are prefilled in chunks.
        jobs[name, runner] = Job(
            folder=str(folder / name),
            result=str(folder / f"{name}-{runner}.pt"),
            rounds=rounds,
            cpu="V1" if runner == RANKS else runner,
            tensor_parallel=2 if runner == RANKS else 1,
            small_size=96 if name == "gemma4" else 112,
            budget=160,
        )
    done = engine.run_all(list(jobs.values()), at_once=2, timeout=900, total=1500)

    def of(name: str, runner: str) -> Ran:
        job = jobs[name, runner]
        assert job in done, f"the engine failed:\n{job.log.read_text()[-4000:]}"
        return Ran(job, torch.load(job.result, weights_only=False))

    return of


@pytest.mark.parametrize(("name", "runner", "round_"), RIGHT, ids=map(" ".join, RIGHT))
def test_logprobs_are_those_of_transformers(
    ran: Callable[[str, str], Ran], name: str, runner: str, round_: str
) -> None:
    own = ran(name, runner)
    errors = own.errors(round_)
    assert set(errors) == set(engine.prompts(own.job))
    assert max(errors.values()) < LIMITS[name], errors
    causal = own.errors(round_, spans=False)
    assert all((causal[prompt] > SEEN) == (prompt in own.with_images) for prompt in errors), causal


@pytest.mark.parametrize("name", [name for name, _ in PARALLEL])
def test_this_library_ran_it_on_two_ranks(ran: Callable[[str, str], Ran], name: str) -> None:
    log = ran(name, RANKS).job.log.read_text()
    assert "Worker_TP1" in log
    assert "FA4_PREFIXLM: " in log.partition("Worker_TP0")[2]


@pytest.mark.parametrize(("name", "runner"), EXACT, ids=map(" ".join, EXACT))
def test_this_library_ran_it_in_chunks(ran: Callable[[str, str], Ran], name: str, runner: str) -> None:
    own = ran(name, runner)
    assert own.saved["runner"] == runner
    assert own.saved["backends"] == ["PrefixLMBackend"]
    counts = own.saved["counts"]
    assert 0 < counts["steps with images"] < counts["steps"]
    assert counts["calls"] >= counts["steps"]
    assert max(len(tokens) for tokens, *_ in own.saved["rounds"][TOGETHER].values()) > 2 * own.job.budget
    # Three groups' builders, and none of this is more than one step's.
    assert counts["steps with images"] > len(own.with_images)


@pytest.mark.parametrize(("name", "runner"), EXACT, ids=map(" ".join, EXACT))
def test_a_hit_of_the_prefix_cache_begins_inside_of_an_image(
    ran: Callable[[str, str], Ran], name: str, runner: str
) -> None:
    own = ran(name, runner)
    place = oracle.image_token(own.job.folder)
    found = {prompt: cached for prompt, (*_, cached) in own.saved["rounds"][CACHED].items()}
    assert sum(cached > 0 for cached in found.values()) >= 5
    inside = {
        prompt
        for prompt, (tokens, *_) in own.saved["rounds"][CACHED].items()
        if found[prompt] and tokens[found[prompt] - 1] == tokens[found[prompt]] == place
    }
    assert inside, found
    assert not any(cached for *_, cached in own.saved["rounds"][TOGETHER].values())


@pytest.mark.parametrize("name", LIMITS)
def test_the_comparison_sees_attention_that_is_zero(ran: Callable[[str, str], Ran], name: str) -> None:
    errors = ran(name, "V1").errors(ZEROED)
    assert min(errors.values()) > SEEN, errors


@pytest.mark.parametrize("name", LIMITS)
def test_the_comparison_sees_spans_that_are_dropped(ran: Callable[[str, str], Ran], name: str) -> None:
    own = ran(name, "V1")
    errors, causal = own.errors(DROPPED), own.errors(DROPPED, spans=False)
    assert all((error > SEEN) == (prompt in own.with_images) for prompt, error in errors.items()), errors
    assert max(causal.values()) < LIMITS[name], "then it is a causal engine"


def test_the_comparison_sees_a_soft_cap_that_is_dropped(ran: Callable[[str, str], Ran]) -> None:
    errors = ran("paligemma2", "V1").errors(UNCAPPED)
    assert min(errors.values()) > SEEN, errors


@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
def test_images_longer_than_the_window_run_causally_as_vllm_has_it(ran: Callable[[str, str], Ran], name: str) -> None:
    own = ran(f"{name}-narrow", "V1")
    assert max(own.errors(TOGETHER, spans=False).values()) < LIMITS[name]
    errors = own.errors(TOGETHER)
    assert all(errors[prompt] > SEEN for prompt in own.with_images), errors
    line = f"images of more than {WINDOW} tokens run causally, as vLLM has it"
    assert own.job.log.read_text().count(line) == 1


def test_the_log_says_once_what_runs_where(ran: Callable[[str, str], Ran]) -> None:
    log = ran("gemma4", "V1").job.log.read_text()
    for line in (
        "FA4_PREFIXLM: 3 layers of head dim 64, blocks of 64, PrefixLM(window=48, clamp=True): `reference`",
        "FA4_PREFIXLM: 3 layers of head dim 128, blocks of 32, causal: `reference`",
    ):
        assert log.count(line) == 1, line
    assert "run causally" not in log
