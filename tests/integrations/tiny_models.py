"""Tiny models of transformers' real classes with random weights, and the inputs that their processors would make."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers

from tests.masks.models import oracles

NAME = "fa4_prefixlm"
VOCABULARY = 32
IMAGE_TOKEN = 5  # Molmo 2's image patch
CACHE = oracles._CACHE  # what this version calls the cache argument

# Wider than the oracles' models, whose masks are looked at and not their logits: grouped heads, four layers.
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    # Otherwise generate() may stop on a random token.
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_LAYERS = ["sliding_attention", "full_attention"] * 2
# The last layer reads the keys of the one before of its kind; global layers have another head dim.
_GEMMA4 = {
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
_OWN = {"gemma4": _GEMMA4, "gemma4_unified": {"global_head_dim": 32, "num_global_key_value_heads": 1}}
WITH_WINDOW = ("gemma3", "gemma4", "gemma4_unified", "paligemma2")
NAMES = (*WITH_WINDOW, "paligemma1", "molmo2")


def model(name: str, attention: str = "eager", *, window: int = 8, seed: int = 0, **text: Any) -> Any:
    """A model on the CPU, float32, in evaluation mode. text: what the text configuration has instead."""
    model_type, own, rest = oracles._CONFIGS[name]
    values = {**own, **_TEXT, **_OWN.get(name, {}), **text}
    if name in WITH_WINDOW:
        values |= {"sliding_window": window, "layer_types": _LAYERS}
    if name == "molmo2":
        rest = {**rest, "image_patch_id": IMAGE_TOKEN}
        rest["adapter_config"] = {**rest["adapter_config"], "text_hidden_size": 32}
    if name == "gemma3":  # as many as the tiny tower has patches
        rest = {**rest, "mm_tokens_per_image": 4}
    if name.startswith("paligemma"):
        rest = {**rest, "projection_dim": 32}
    config = transformers.AutoConfig.for_model(model_type, text_config=values, **rest)
    torch.manual_seed(seed)
    made = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    # With the initial 0.02 every layer is nearly linear in its values' average, whatever its mask is.
    with torch.no_grad():
        for own_name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4 if "proj" in own_name else 1.0)
    return made


def text_model(model_type: str, attention: str = "eager", *, seed: int = 0, **values: Any) -> Any:
    """A tiny causal language model."""
    config = transformers.AutoConfig.for_model(model_type, **{**_TEXT, **values})
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
            elif parameter.ndim > 1:
                parameter.normal_(std=0.4 if "experts" not in name else 0.1)
    return made


def types_name(name: str) -> str:
    """The argument that tells a model which tokens are of an image."""
    return oracles._TOKEN_TYPES.get(name, "mm_token_type_ids")


def types_of(name: str, images: list[list[tuple[int, int]]], length: int) -> torch.Tensor:
    """Token types of rows with images at `images`; PaliGemma's prefix is everything up to the end of the last one."""
    types = torch.zeros(len(images), length, dtype=torch.long)
    for row, own in zip(types, images, strict=True):
        for start, end in own:
            row[start:end] = 1
        if name.startswith("paligemma"):
            row.zero_()
            row[max((end for _, end in own), default=1) :] = 1
    return types


def inputs(name: str, types: torch.Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Random tokens with these types; for Molmo 2, whose mask depends on it, image features too."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCABULARY, types.shape, generator=generator)
    made: dict[str, Any] = {types_name(name): types, "input_ids": ids}
    if name == "molmo2" and (types == 1).any():
        ids[types == 1] = IMAGE_TOKEN
        features = torch.randn(int((types == 1).sum()), 32, generator=generator)
        made["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=[features])}
    return made


def logits(made: Any, attention: str, **arguments: Any) -> torch.Tensor:
    """The logits of a forward with this attention."""
    made.set_attn_implementation(attention)
    with torch.no_grad():
        return made(**arguments).logits
