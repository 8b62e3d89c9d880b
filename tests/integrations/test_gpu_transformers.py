"""On a Hopper GPU: as far from float32 as SDPA in bfloat16 is, on this library's kernels, one wait a forward."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

from transformers import masking_utils

import fa4_prefixlm.integrations.transformers  # noqa: F401
from fa4_prefixlm.integrations.transformers import layer_attention, masks
from tests.integrations.tiny_models import NAME, NAMES, WITH_WINDOW, inputs, model, types_of

pytestmark = pytest.mark.gpu
LENGTH, WINDOW = 1536, 256
IMAGES = [[(40, 296), (400, 1000)], [(700, 956)]]
WIDTHS = {"head_dim": 128, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def made_for(name: str, attention: str, dtype: torch.dtype, global_head_dim: int = 256) -> Any:
    """Weights that are the same bfloat16 numbers in any dtype; small ones, which do not blow rounding up."""
    widths: dict[str, Any] = dict(WIDTHS)
    if name.startswith("gemma4"):
        widths["global_head_dim"] = global_head_dim
    if name == "molmo2":
        widths.pop("hidden_size")  # that of its adapter
    if name.startswith("paligemma"):
        widths["hidden_size"] = 32
    made = model(name, attention, window=WINDOW, **widths)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2)
    return made.to("cuda", torch.bfloat16).to(dtype)


def given_for(name: str, pad: bool) -> dict[str, Any]:
    types = types_of(name, IMAGES, LENGTH)
    real = torch.ones(2, LENGTH, dtype=torch.long)
    if pad:
        real[1, :100] = 0
        types = types.masked_fill(real == 0, 0) if name.startswith("paligemma") else types
    given: dict[str, Any] = inputs(name, types) | {"attention_mask": real}
    encoded = given.pop("mm_encoder_outputs", None)
    given = {key: own.cuda() for key, own in given.items()}
    if encoded is not None:
        encoded["image"].pooler_output = [own.cuda() for own in encoded["image"].pooler_output]
        given["mm_encoder_outputs"] = encoded
    return given


def run(made: Any, attention: str, given: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    made.set_attn_implementation(attention)
    given = dict(given)
    if "mm_encoder_outputs" in given:
        features = given["mm_encoder_outputs"]["image"]
        features.pooler_output = [own.to(dtype) for own in features.pooler_output]
    with torch.no_grad():
        return made(**given, use_cache=False).logits.float()


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_as_exact_as_sdpa(name: str, pad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = hold_against_sdpa(monkeypatch, name, pad)
    assert len(plans) == (2 if name in WITH_WINDOW else 1)
    assert {plan.choice.name for plan in plans} <= {"native", "causal", "varlen", "packed"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_whose_head_dim_fa4_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_attention, "FLEX_FROM", LENGTH)
    masks._warned.clear()
    with pytest.warns(UserWarning, match="FlexAttention"):
        plans = hold_against_sdpa(monkeypatch, "gemma4", True, global_head_dim=512)
    assert {plan.choice.name for plan in plans} == {"native", "flex"}


def hold_against_sdpa(monkeypatch: pytest.MonkeyPatch, name: str, pad: bool, **more: Any) -> list[Any]:
    """The plans that were made."""
    plans: list[Any] = []
    make = layer_attention._make_plan
    monkeypatch.setattr(layer_attention, "_make_plan", lambda *a: plans.append(make(*a)) or plans[-1])
    given = given_for(name, pad)
    real = given["attention_mask"] == 1
    exact = run(made_for(name, "eager", torch.float32, **more), "eager", given, torch.float32)[real]
    short = made_for(name, "eager", torch.bfloat16, **more)
    errors = {}
    baseline = "eager" if name == "paligemma2" else "sdpa"  # SDPA has no softcap
    for attention in (baseline, NAME):
        found = run(short, attention, given, torch.bfloat16)[real]
        assert found.isfinite().all()
        errors[attention] = float((found - exact).norm() / exact.norm())
    assert errors[NAME] <= 1.5 * errors[baseline]
    return plans


def test_one_wait_a_forward() -> None:
    """With padding to look for: the read of the masks. Without a plan's kernels being compiled."""
    made, given = made_for("gemma3", NAME, torch.bfloat16), given_for("gemma3", True)
    run(made, NAME, given, torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(made, NAME, given, torch.bfloat16)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing" in str(own.message) for own in caught) <= 1


@pytest.mark.parametrize("kind", ["one run", "several runs", "padded", "a static cache"])
def test_one_launch_makes_the_masks_that_torch_makes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with what is read of them, and without a wait."""
    device, keys = torch.device("cuda", torch.cuda.current_device()), 20000
    ids = torch.full((2, keys), -1, device=device)
    for number, start in enumerate(range(100, keys - 900, 1700)):
        ids[:, start : start + 800] = number if kind != "several runs" else 0
    real = torch.ones(2, keys, dtype=torch.bool, device=device)
    real[1, :300] = kind != "padded"
    offset = torch.tensor(500, device=device) if kind == "a static cache" else 500
    both_ways = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(ids))
    local = masking_utils.and_masks(masking_utils.sliding_window_overlay(1024), both_ways)
    makers = [
        functools.partial(masks.mask, 2, keys - 500, keys, offset, 0, function, real, device=device)
        for function in (both_ways, local)
    ]
    for make in makers:
        make()  # compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [make() for make in makers]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(masks, "launches", lambda device: False)
    for own, make in zip(made, makers, strict=True):
        wanted = make()
        assert torch.equal(own, wanted)
        seen, expected = (masks._records[of].read.numbers() for of in (own, wanted))
        assert seen[1] == expected[1] == (kind == "several runs")
        assert seen == expected or kind == "several runs", "numbers of no mask"


def test_the_read_of_a_mask_does_not_wait_for_what_was_launched_after_it() -> None:
    bounds = masks.mask(1, 64, 64, device="cuda")
    assert bounds is not None
    torch.cuda._sleep(2_000_000_000)  # cycles: a second
    slept = torch.cuda.current_stream().record_event()
    seen = masks.known(bounds, 64).seen
    assert not slept.query()
    assert seen is not None
    assert seen.causal
    torch.cuda.synchronize()


def test_static_cache_generates_what_sdpa_does() -> None:
    """Greedy, with the decoding step compiled, in float32 where kernels agree to the token."""
    made, given = made_for("gemma3", "sdpa", torch.float32), given_for("gemma3", True)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    tokens = []
    for attention in ("sdpa", NAME):
        made.set_attn_implementation(attention)
        tokens.append(made.generate(**given, **options))
    assert (tokens[0] == tokens[1]).all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_prefill() -> None:
    made, given = made_for("gemma3", NAME, torch.bfloat16), given_for("gemma3", True)
    real = given["attention_mask"] == 1
    eager = run(made, NAME, given, torch.bfloat16)[real]
    with torch.no_grad():
        found = torch.compile(made, fullgraph=True)(**given, use_cache=False).logits.float()[real]
    assert (found - eager).norm() <= 0.02 * eager.norm()
