"""Which backward is chosen, and why, for builds and GPUs that are not here."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.backends.select_backward import Backward, choose_backward
from fa4_prefixlm.fa4.builds.describe import BEST
from fa4_prefixlm.geometry.traits import traits_of_any
from fa4_prefixlm.masks import causal, one_block, prefix, window
from fa4_prefixlm.runtime.fallback_warnings import warn_of_slow_backward
from tests.backends.calls import GPU_CALL

# As 4.0.0b36 is.
B36 = dataclasses.replace(BEST, sm90_backward_head_dims="wrong")
CALL = dataclasses.replace(GPU_CALL, shape_q=(900,), shape_k=(900,), device=torch.device("cuda"), needs_grad=True)


def chosen(mask: fp.Mask = fp.PrefixLM(), build=B36, *, spans: int = 3, name: str = "auto", **change) -> Backward:  # noqa: B008
    deterministic = change.pop("deterministic", False)
    names = mask.names if spans else ()
    traits = traits_of_any(mask, dict.fromkeys(names, 256), dict.fromkeys(names, spans))
    spec = dataclasses.replace(CALL, **change)
    return choose_backward(name, spec, traits, build, forward="varlen", deterministic=deterministic)


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        ({}, "native", None),
        ({"mask": causal, "spans": 0}, "causal", None),
        ({"mask": causal & (prefix("image") | window(60))}, "native", None),
        ({"mask": causal | one_block("image"), "spans": 9}, "packed", "masks of intervals alone"),
        ({"build": dataclasses.replace(B36, backward_refusal="it is another")}, "packed", "it is another"),
        ({"arch": 100}, "packed", "it is made for SM90, not sm_100"),
        ({"arch": 100, "head_dim": 256, "head_dim_v": 256}, "flex", "on SM100 has limits that were not tried"),
        ({"arch": 80}, "flex", "no kernel for sm_80"),
        ({"dtype": torch.float32}, "flex", "not torch.float32"),
        ({"head_dim_v": 64}, "flex", "FA4's backward takes equal head dims"),
        ({"head_dim": 192, "heads_kv": 4}, "native", None),
        ({"head_dim": 192}, "flex", "as many key heads as query heads"),
        ({"head_dim": 72, "head_dim_v": 72}, "native", None),
        ({"build": None}, "flex", "flash-attn-4 is not installed"),
        ({"build": dataclasses.replace(BEST, backward_arguments=frozenset())}, "flex", "has no backward"),
        ({"deterministic": True}, "native", None),
        ({"mask": causal | one_block("image"), "spans": 9, "deterministic": True}, "flex", "masks of intervals alone"),
        ({"build": None, "dtype": torch.float64}, "reference", "flash-attn-4 is not installed"),
        ({"build": None, "device": torch.device("cpu")}, "reference", "FA4 needs a GPU"),
    ],
)
def test_the_first_that_runs_the_call(change: dict, name: str, why: str | None) -> None:
    found = chosen(**change)
    assert found.name == name
    assert why is None or why in dict(found.passed_over)["native"]


@pytest.mark.parametrize("dim", range(8, 264, 8))
def test_head_dims_at_which_fa4_is_wrong(dim: int) -> None:
    """Its kernel rounds up to 16 where the kernels around it round to 32: they agree where both give the same."""
    agree = dim > 128 or -(-dim // 16) * 16 == -(-dim // 32) * 32
    dims = {"head_dim": dim, "head_dim_v": dim}
    assert chosen(causal, spans=0, **dims).name == ("causal" if agree else "native")
    assert chosen(causal, BEST, spans=0, **dims).name == "causal"
    assert chosen(**dims).name == "native"
    other = dataclasses.replace(B36, backward_refusal="it is another")
    found = chosen(build=other, **dims)
    assert found.name == ("packed" if agree else "flex" if dim >= 16 else "reference")
    assert agree or "is wrong at head dim" in dict(found.passed_over)["packed"]
    assert chosen(build=dataclasses.replace(other, sm90_backward_head_dims="unknown"), **dims).name == found.name


def test_the_defect_is_stated() -> None:
    assert "sm90-backward-head-dims" in [own.name for own in B36.defects]
    assert "sm90-backward-head-dims" not in [own.name for own in BEST.defects]


def test_what_is_asked_for_by_name() -> None:
    assert chosen(name="packed").reason == "asked for by name"
    with pytest.raises(fp.UnsupportedError, match="not plainly causal"):
        chosen(name="causal")
    with pytest.raises(fp.UnsupportedError, match="its order of writes differs"):
        chosen(name="packed", deterministic=True)
    with pytest.raises(
        fp.InputError, match="^backward: expected one of auto, causal, native, packed, cudnn, flex, reference"
    ):
        chosen(name="fast")
    with pytest.raises(fp.UnsupportedError, match="contiguous keys"):
        chosen(name="native", page_size=16)
    assert chosen(page_size=16).name is None


def test_a_slow_backward_warns_on_a_gpu() -> None:
    found = chosen(build=None, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"gradients by the dense reference.*flash-attn-4 is not installed"):
        warn_of_slow_backward(found, CALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slow_backward(found, dataclasses.replace(CALL, device=torch.device("cpu")))
        warn_of_slow_backward(chosen(name="reference"), CALL)
        warn_of_slow_backward(chosen(), CALL)


def test_print_shows_both_ways() -> None:
    q, k, v = (torch.zeros(9, 2, 8) for _ in range(3))
    plan = fp.plan([[(1, 4)]], like=(q, k, v), cu_seqlens_q=[0, 9], cu_seqlens_k=[0, 9])
    lines = str(plan).splitlines()
    assert any(line.startswith("backend  reference") for line in lines)
    assert any(line.startswith("backward reference") for line in lines)
