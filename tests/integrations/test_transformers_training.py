"""Gradients, gradient checkpointing and Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

import fa4_prefixlm.integrations.transformers  # noqa: F401
from tests.integrations.tiny_models import NAME, NAMES, inputs, model, text_model, types_of

pytestmark = pytest.mark.slow

LENGTH = 48


def gradients(made: Any, attention: str, **given: Any) -> dict[str, torch.Tensor]:
    """Of a loss over real tokens: a row that sees nothing is 0 here, and an average with eager attention."""
    made.set_attn_implementation(attention)
    made.zero_grad()
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])) == 1
    made(**given, use_cache=False).logits[real].log_softmax(-1).square().mean().backward()
    return {name: own.grad.clone() for name, own in made.named_parameters() if own.grad is not None}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within 1e-4 of the largest gradient: float32, through four layers of large random weights."""
    assert found.keys() == expected.keys()
    assert any("k_proj" in own or "att_proj" in own for own in expected)
    largest = max(float(own.abs().max()) for own in expected.values())
    for name, own in expected.items():
        assert (found[name] - own).abs().max() <= 1e-4 * largest, name


@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str, rows: str) -> None:
    made = model(name).train()
    given = inputs(name, types_of(name, [[(3, 17), (22, 31)], [(20, 40)]], LENGTH))
    if rows == "packed":
        given["position_ids"] = torch.cat([torch.arange(n) for n in (19, 29)]).expand(2, -1)
    else:
        given["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
        given["attention_mask"][1, 41:] = 0
    expected = gradients(made, "eager", **given)
    close(gradients(made, NAME, **given), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    made = model("gemma3").train()
    given = inputs("gemma3", types_of("gemma3", [[(3, 17), (22, 31)]], LENGTH))
    expected = gradients(made, "eager", **given)
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    close(gradients(made, NAME, **given), expected)


def test_sinks_and_softcap() -> None:
    layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    for name, own in (("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 2}), ("gemma2", {})):
        made = text_model(name, **layers, **own).train()
        given = {"input_ids": torch.randint(6, 32, (1, LENGTH))}
        expected = gradients(made, "eager", **given)
        close(gradients(made, NAME, **given), expected)
        assert name != "gpt_oss" or "model.layers.0.self_attn.sinks" in expected
