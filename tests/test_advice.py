"""What is said of a step down, and what a launch does on builds that take less than the newest."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
import warnings

import pytest
import torch
from test_build import DEMAND, GOOD, GPU_CALL, NO_NATIVE

import fa4_prefixlm as fp
from fa4_prefixlm.backends import select as backends
from fa4_prefixlm.backends.reference import dense_attention
from fa4_prefixlm.batch import lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.builds.describe import BEST, CAUSAL_ARGUMENTS, PAGED_ARGUMENTS
from fa4_prefixlm.fa4.kernels import launch
from fa4_prefixlm.masks import PrefixLM
from fa4_prefixlm.runtime import fallback_warnings as advice

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


def test_varlen_is_not_called_faster_than_packed() -> None:
    (said,) = told(dataclasses.replace(GPU_CALL, arch=100), OLD)
    assert said.endswith("(4.0.0b13 and later take it). flash-attn-4 4.0.0b36 takes varlen")


def test_what_no_build_does_better_is_not_told() -> None:
    assert told(GPU_CALL, GOOD) == []
    assert told(GPU_CALL, BEST) == []
    several = dataclasses.replace(DEMAND, intervals=2, banded=False, causal_part=None)
    assert told(GPU_CALL, NO_NATIVE, several) == []
    assert told(dataclasses.replace(GPU_CALL, device=torch.device("cpu")), OLD) == []


def test_a_build_with_a_causal_call_alone_is_still_exact() -> None:
    bare = dataclasses.replace(OLD, arguments=CAUSAL_ARGUMENTS)
    contiguous, paged = (backends.choose("auto", call, DEMAND, SIZES, bare) for call in (GPU_CALL, PAGED_CALL))
    assert (contiguous.name, contiguous.gathered) == ("two_pass", False)
    assert (paged.name, paged.gathered) == ("two_pass", True)
    no_pages = dataclasses.replace(OLD, arguments=PAGED_ARGUMENTS, sm90_pages=False)
    assert backends.choose("auto", PAGED_CALL, DEMAND, SIZES, no_pages).gathered


def test_pages_gather_for_varlen_and_else_take_two_passes() -> None:
    varlen, old = (backends.choose("auto", PAGED_CALL, DEMAND, SIZES, build) for build in (NO_NATIVE, OLD))
    assert (varlen.name, varlen.gathered) == ("varlen", True)
    assert (old.name, old.gathered) == ("two_pass", False)


def test_a_serving_plan_tells_of_its_step_down(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(importlib.import_module("fa4_prefixlm.runtime.serving_plans"), "find_build", lambda module: OLD)
    with FakeTensorMode():
        q, k = (torch.empty(*shape, 128, dtype=torch.bfloat16, device="cuda") for shape in ((1, 4), (9, 16, 2)))
        with pytest.warns(UserWarning, match="takes two_pass, not native"):
            plan = fp.serving_plan(like=(q, k, k), max_tokens=100, max_sequences=2, max_pages=8)
    assert (plan.choice.name, plan.in_place) == ("two_pass", True)
    assert dict(plan.choice.passed_over)["native"] == "its internals are not known"


def test_two_passes_are_for_masks_that_are_a_causal_pass_and_a_rest() -> None:
    two_pass = backends.BACKENDS["two_pass"]
    for mask in (PrefixLM(), PrefixLM(9), PrefixLM(9, clamp=False)):
        traits = backends_demand(mask)
        assert traits.causal_part is not None
        assert traits.causal_part.window == mask.window
        assert two_pass.refusal(GPU_CALL, traits, GOOD) is None
    for change in ({"causal_part": None}, {"intervals": 2}):
        several = dataclasses.replace(DEMAND, **change)
        assert (
            two_pass.refusal(GPU_CALL, several, GOOD)
            == "the mask is not a causal pass plus the rest of one set of spans"
        )


def backends_demand(mask):
    from fa4_prefixlm.geometry.traits import traits_of_any

    return traits_of_any(mask, {"image": 256}, {"image": 4})


@pytest.mark.parametrize("sink_dtype", [torch.float32, torch.bfloat16])
def test_a_sink_that_a_build_does_not_take_joins_its_output(
    monkeypatch: pytest.MonkeyPatch, sink_dtype: torch.dtype
) -> None:
    """The build is played in torch: it takes sinks in bfloat16, and no pages."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, heads, 16, generator=generator) for heads in (4, 2, 2))
    sink = torch.randn(4, generator=generator).to(sink_dtype)
    seqlens, seen = ((40,), (40,)), []

    def attend(q, k, v, own_sink):
        options = Options(0.25, 0.0, own_sink)
        return dense_attention(q, k, v, mask=PrefixLM(), spans={"image": ((),)}, seqlens=seqlens, options=options)

    def forward(q, k, v, *, learnable_sink, **named):
        seen.append((learnable_sink, set(named)))
        return attend(q, k, v, learnable_sink)

    monkeypatch.setitem(sys.modules, "played_fa4", types.ModuleType("played_fa4"))
    interface = types.ModuleType("played_fa4.interface")
    interface._flash_attn_fwd = forward
    monkeypatch.setitem(sys.modules, "played_fa4.interface", interface)
    build = dataclasses.replace(OLD, module="played_fa4", sink_dtypes=(torch.bfloat16,))
    cu = torch.tensor([0, 40], dtype=torch.int32)
    out, lse = launch.causal_forward(
        q,
        k,
        v,
        build=build,
        cu_seqlens_q=cu,
        max_seqlen_q=40,
        keys=launch.Keys(40, cu_seqlens_k=cu),
        options=Options(0.25, learnable_sink=sink),
    )
    expected, expected_lse = attend(q, k, v, sink)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(lse, expected_lse, atol=1e-6)
    ((given, named),) = seen
    assert (given is sink) is (sink_dtype == torch.bfloat16)
    assert named <= CAUSAL_ARGUMENTS
