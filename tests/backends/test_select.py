"""The choice of backend, of what a build and a mask say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.backends import flex
from fa4_prefixlm.backends import select as backends
from fa4_prefixlm.batch import lengths
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds import describe as builds
from fa4_prefixlm.fa4.builds.describe import CAUSAL_ARGUMENTS, PAGED_ARGUMENTS
from fa4_prefixlm.geometry.traits import CausalWindow, Traits
from fa4_prefixlm.masks import PrefixLM
from tests.backends.calls import DEMAND, GOOD, GPU_CALL, NO_NATIVE
from tests.batch.bad_calls import rejects


def choose(
    build: builds.Build | None,
    call: CallSpec = GPU_CALL,
    name: str = "auto",
    tokens: int = 1000,
    arch: int = 90,
    traits: Traits | None = None,
) -> backends.Choice:
    sizes = lengths.batched(1, tokens, tokens, torch.device("cpu"))
    return backends.choose(name, dataclasses.replace(call, arch=arch), traits or DEMAND, sizes, build)


class Word(str):
    """Equal to a name, and not one."""


@pytest.mark.parametrize("odd", [["flex"], {"flex"}, {}, "nope"], ids=repr)
def test_odd_names_of_backends(odd: object) -> None:
    q = torch.zeros(1, 8, 2, 16)
    for like in (q, q[:, :0]):
        with pytest.raises(fp.InputError, match="backend: expected one of auto, causal,"):
            fp.plan(like=(like, q, q), backend=odd)  # type: ignore[arg-type]
    for backend in ("auto", "flex", "reference"):
        with pytest.raises(fp.InputError, match="backward: expected one of auto,"):
            fp.plan(like=(q, q, q), backend=backend, backward=odd)  # type: ignore[arg-type]


def test_a_name_of_another_class_stays_with_its_caller() -> None:
    q = torch.zeros(1, 8, 2, 16)
    for name in (Word("flex"), "flex"):
        assert type(fp.plan(like=(q, q, q), backend=name).choice.name) is str


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(GOOD)
    assert (choice.name, [name for name, _ in choice.passed_over]) == ("native", ["causal"])
    summary = "FlashAttention-4's SM90 main loop over each row's interval"
    assert str(choice) == f"native: {summary} (causal passed over)"
    without = choose(NO_NATIVE)
    assert (without.name, without.passed_over[-1]) == ("varlen", ("native", "its internals are not known"))
    text = choose(NO_NATIVE, traits=dataclasses.replace(DEMAND, causal_only=CausalWindow(None)))
    assert (text.name, text.passed_over, text.reason) == ("causal", (), "the first choice")


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        ({"varlen_mask": False}, "packed", "refuses mask_mod with aux_tensors for varlen"),
        ({"varlen_lists": False}, "packed", "has no varlen block sparsity"),
        ({"sm90_list_stride": "unknown"}, "packed", "is not clear from its source"),
        ({"sm90_list_stride": "128"}, "varlen", None),
        ({"arguments": builds.CAUSAL_ARGUMENTS}, "two_pass", "has no argument aux_tensors, block_sparse_tensors"),
        ({"arguments": frozenset({"q"})}, "flex", "has no argument aux_tensors"),
    ],
)
def test_what_a_build_cannot_do_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, change: dict, name: str, why: str
) -> None:
    choice = choose(dataclasses.replace(NO_NATIVE, **change))
    assert choice.name == name
    assert why is None or why in dict(choice.passed_over)["varlen"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "FA4 takes bfloat16 and float16, not torch.float32"),
        ({"head_dim": 320}, "SM90 takes head dims up to 256"),
        ({"head_dim": 100}, "multiples of 8"),
        ({"arch": 80, "head_dim": 96}, "no kernel for sm_80"),
    ],
)
def test_what_fa4_cannot_run_goes_to_flex(change: dict, why: str) -> None:
    call = dataclasses.replace(GPU_CALL, **change)
    choice = choose(GOOD, call, arch=call.arch)
    assert choice.name == "flex"
    assert [name for name, _ in choice.passed_over] == ["causal", "native", "varlen", "packed", "two_pass", "cudnn"]
    assert all(why in dict(choice.passed_over)[name] for name in ("varlen", "packed", "two_pass"))
    with pytest.raises(fp.UnsupportedError, match=why):
        choose(GOOD, call, name="packed", arch=call.arch)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float64}, "FlexAttention takes bfloat16, float16 and float32, not torch.float64"),
        ({"arch": 75}, "torch tests FlexAttention on sm_80 and later, not sm_75"),
        ({"head_dim": 8}, "FlexAttention takes head dims of at least 16 on a GPU"),
        ({"head_dim_v": 8, "dtype": torch.float32}, "FlexAttention takes head dims of at least 16 on a GPU"),
    ],
)
def test_what_flex_cannot_run_goes_to_the_reference(change: dict, why: str) -> None:
    call = dataclasses.replace(GPU_CALL, **change)
    choice = choose(None, call, arch=call.arch)
    assert (choice.name, choice.passed_over[-1]) == ("reference", ("flex", why))
    with pytest.raises(fp.UnsupportedError, match=why):
        choose(None, call, name="flex", arch=call.arch)


def test_without_triton_there_is_no_flex_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "has_triton", lambda: False)
    choice = choose(None)
    assert (choice.name, choice.passed_over[-1][1][:23]) == ("reference", "Triton is not installed")


def test_on_the_cpu_flex_is_taken_by_name_alone() -> None:
    call = dataclasses.replace(GPU_CALL, device=torch.device("cpu"), arch=0)
    choice = choose(GOOD, call, arch=0)
    assert choice.name == "reference"
    assert "there for tests" in dict(choice.passed_over)["flex"]
    assert all("the tensors are on cpu" in dict(choice.passed_over)[name] for name in ("native", "packed", "two_pass"))
    assert choose(GOOD, call, name="flex", arch=0).reason == "asked for by name"


def test_no_fa4_and_no_fitting_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("varlen", "flash-attn-4 is not installed") in choose(None).passed_over
    assert "no kernel for sm_80" in dict(choose(GOOD, arch=80).passed_over)["two_pass"]


def test_long_windowed_sequences_take_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(NO_NATIVE, tokens=2**19)
    assert choice.name == "packed"
    assert choice.passed_over[2:] == (("varlen", "its block lists would take 128 MiB, packed ones 0 MiB"),)
    assert choose(GOOD, name="varlen", tokens=2**19).reason == "asked for by name"


def test_no_query_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(GOOD, tokens=0).reason == "there are no queries"


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        ({"banded": False}, "native", None),
        ({"intervals": 4}, "varlen", None),
        ({"intervals": 5}, "flex", "a row may see 5 intervals of keys, the kernels take 4"),
        ({"tagged": True}, "varlen", None),
        ({"custom": True, "intervals": 9}, "varlen", None),
    ],
)
def test_what_a_mask_asks_for(monkeypatch: pytest.MonkeyPatch, change: dict, name: str, why: str | None) -> None:
    traits = dataclasses.replace(DEMAND, **{"banded": False, "causal_part": None, **change})
    choice = choose(GOOD, traits=traits)
    assert choice.name == name
    assert why is None or dict(choice.passed_over)["packed"] == why
    if "tagged" in change or "custom" in change:
        with pytest.raises(fp.UnsupportedError, match="sequence"):
            choose(GOOD, name="packed", traits=traits)


SIZES = lengths.batched(1, 1000, 1000, torch.device("cpu"))

OLD = dataclasses.replace(NO_NATIVE, name="flash-attn-4 4.0.0b12", varlen_mask=False, varlen_lists=False)

PAGED_CALL = dataclasses.replace(GPU_CALL, page_size=16, shape_k=(100, 16))


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


def test_two_passes_are_for_masks_that_are_a_causal_pass_and_a_rest() -> None:
    two_pass = backends.BACKENDS["two_pass"]
    for mask in (PrefixLM(), PrefixLM(9), PrefixLM(9, clamp=False)):
        traits = backends_demand(mask)
        assert traits.causal_part is not None
        assert traits.causal_part.window == mask.window
        assert two_pass.refusal(GPU_CALL, traits, GOOD) is None
    for change in ({"causal_part": None}, {"intervals": 2}):
        several = dataclasses.replace(DEMAND, **change)
        assert two_pass.refusal(GPU_CALL, several, GOOD) == "the mask is not a causal pass plus the rest of spans"


def backends_demand(mask):
    from fa4_prefixlm.geometry.traits import traits_of_any

    return traits_of_any(mask, {"image": 256}, {"image": 4})


@pytest.mark.parametrize("backend", ["varlen", "packed"])
def test_a_backend_that_cannot_run_here_is_refused_by_name(backend: str) -> None:
    rejects("FA4 needs a GPU, the tensors are on cpu", backend=backend, error=fp.UnsupportedError)
