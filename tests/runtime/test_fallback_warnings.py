"""What is said of a step down."""

from __future__ import annotations

import dataclasses
import importlib
import warnings

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.backends import select as backends
from fa4_prefixlm.batch import lengths
from fa4_prefixlm.fa4.builds.describe import BEST
from fa4_prefixlm.runtime import fallback_warnings as advice
from tests.backends.calls import DEMAND, GOOD, GPU_CALL, NO_NATIVE

SIZES = lengths.batched(1, 1000, 1000, torch.device("cpu"))
OLD = dataclasses.replace(NO_NATIVE, name="flash-attn-4 4.0.0b12", varlen_mask=False, varlen_lists=False)
PAGED_CALL = dataclasses.replace(GPU_CALL, page_size=16, shape_k=(100, 16))


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_ARCH", "sm_90")
    monkeypatch.setattr(advice, "_warned", set())


def told(call, build, traits=DEMAND) -> list[str]:
    choice = backends.choose("auto", call, traits, SIZES, build)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            advice.warn_of_fallback(choice, call, traits, SIZES, build)
    return [str(warning.message) for warning in caught]


def test_a_step_down_is_told_once_with_both_builds() -> None:
    (said,) = told(GPU_CALL, OLD)
    assert said == (
        "flash-attn-4 4.0.0b12: fa4_prefixlm takes packed, not native: its internals are not known. "
        "flash-attn-4 4.0.0b36 takes native, which is faster"
    )
    (said,) = told(PAGED_CALL, OLD)
    assert "takes two_pass, not native" in said


def test_flex_for_want_of_fa4_is_told() -> None:
    (said,) = told(GPU_CALL, None)
    assert said == (
        "without FlashAttention-4: fa4_prefixlm takes flex, not native: flash-attn-4 is not installed. "
        "flash-attn-4 4.0.0b36 takes native, which is faster"
    )
    for change in ({"arch": 80}, {"dtype": torch.float32}):  # no build takes it
        assert told(dataclasses.replace(GPU_CALL, **change), None) == []
        assert told(dataclasses.replace(GPU_CALL, **change), GOOD) == []
    assert told(GPU_CALL, GOOD, dataclasses.replace(DEMAND, intervals=5, banded=False, causal_part=None)) == []


def test_varlen_is_not_called_faster_than_packed() -> None:
    (said,) = told(dataclasses.replace(GPU_CALL, arch=100), OLD)
    assert said.endswith("(4.0.0b13 and later take it). flash-attn-4 4.0.0b36 takes varlen")


def test_what_no_build_does_better_is_not_told() -> None:
    assert told(GPU_CALL, GOOD) == []
    assert told(GPU_CALL, BEST) == []
    several = dataclasses.replace(DEMAND, intervals=2, banded=False, causal_part=None)
    assert told(GPU_CALL, NO_NATIVE, several) == []
    assert told(dataclasses.replace(GPU_CALL, device=torch.device("cpu")), OLD) == []


def test_a_serving_plan_tells_of_its_step_down(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(importlib.import_module("fa4_prefixlm.runtime.serving_plans"), "find_build", lambda module: OLD)
    with FakeTensorMode():
        q, k = (torch.empty(*shape, 128, dtype=torch.bfloat16, device="cuda") for shape in ((1, 4), (9, 16, 2)))
        with pytest.warns(UserWarning, match="takes two_pass, not native"):
            plan = fp.serving_plan(like=(q, k, k), max_tokens=100, max_sequences=2, max_pages=8)
    assert (plan.choice.name, plan.in_place) == ("two_pass", True)
    assert dict(plan.choice.passed_over)["native"] == "its internals are not known"
