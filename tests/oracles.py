"""Dense masks as Hugging Face transformers builds them, one function a model. Written against transformers 5.23.0.

Nothing here knows a mask rule. Each oracle makes a model with a tiny random configuration on the CPU, runs its own
forward with eager attention, and returns the mask that reached the attention of a local or a global layer.

What the oracles share:

token_types: `(batch, seqlen_k)` int64, of the whole sequence, with the values that the model's processor writes.
padding: `(batch, seqlen_k)` bool, True is a real token, or None. It hides padding KEYS only; the row of a padding
    query is what the rule gives it. With left padding that is an empty row, but for PaliGemma, whose processor gives
    padding type 0 and so puts it in the prefix. (Eager attention makes an empty row the average of all values.)
cached: tokens that an earlier forward put into a DynamicCache. The other `seqlen_k - cached` are the queries; the model
    gets the token types and the padding of the whole sequence, as in a chunk of `generate(prefill_chunk_size=...)`.
Result: `(batch, seqlen_k - cached, seqlen_k)` bool, True attends. Column j is position j of the sequence; a key that a
    sliding layer's cache no longer has (it keeps the last `window - 1`) is False.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")

Layer = Literal["local", "global"]

_IMAGE_TOKEN = 5  # Molmo 2's image patch in the tiny vocabulary
_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
_SIGLIP = {"vision_config": _SIZES | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}}
_GEMMA4 = {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
_MOLMO2 = {
    "vision_config": _SIGLIP["vision_config"] | {"image_size": [28, 28]},
    "adapter_config": _SIZES | {"text_hidden_size": 16, "vision_feature_layer": [0]},
    "image_patch_id": _IMAGE_TOKEN,
}
# Per model: transformers' model type, what its text configuration adds to the common one, the other configurations.
_CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3", {}, _SIGLIP),
    "gemma4": ("gemma4", _GEMMA4, {}),
    "gemma4_unified": ("gemma4_unified", _GEMMA4, {}),
    "paligemma1": ("paligemma", {"model_type": "gemma"}, _SIGLIP),
    "paligemma2": ("paligemma", {"model_type": "gemma2"}, _SIGLIP),
    "molmo2": ("molmo2", {}, _MOLMO2),
}


def gemma3(
    token_types: torch.Tensor, *, layer: Layer, window: int, padding: torch.Tensor | None = None, cached: int = 0
) -> torch.Tensor:
    """Gemma 3: `create_masks_for_vision_model` in `models/gemma3/modeling_gemma3.py`, for forward and for generate.

    token_types: the model's `token_type_ids`: 1 is an image token. A span is a run of 1s, so images that touch are one
        span (the processor keeps them apart: it puts tokens of type 0 around each image).
    """
    model = _model("gemma3", window)
    return _rows(model, layer, {"token_type_ids": token_types}, padding, cached)


def gemma4(
    token_types: torch.Tensor, *, layer: Layer, window: int, padding: torch.Tensor | None = None, cached: int = 0
) -> torch.Tensor:
    """Gemma 4: `create_masks_for_vision_model` in `models/gemma4/modeling_gemma4.py`, for forward and for generate.

    Of checkpoints with `use_bidirectional_attention="vision"`; with None, the default, all layers are causal.
    token_types: the model's `mm_token_type_ids`: 1 image, 2 video, 3 audio. A span is a run of 1s and 2s, so an image
        and a video that touch are one span. Audio is causal. (The processor keeps images and video frames apart.)
    """
    model = _model("gemma4", window)
    return _rows(model, layer, {"mm_token_type_ids": token_types}, padding, cached)


def gemma4_unified(
    token_types: torch.Tensor,
    *,
    layer: Layer,
    window: int,
    generate: bool,
    padding: torch.Tensor | None = None,
    cached: int = 0,
) -> torch.Tensor:
    """Gemma 4 unified: two functions of `models/gemma4_unified/modeling_gemma4_unified.py` that disagree.

    token_types: as for `gemma4`.
    generate: False is `Gemma4UnifiedModel.forward` with a 2D attention mask: training, and also `generate` with its
        default DynamicCache. True is `Gemma4UnifiedForConditionalGeneration.create_masks_for_generate`, which generate
        calls for a compilable cache only (`cache_implementation="static"`).
    cached: with generate=True the function gets the whole sequence's token types, which is what it needs. `generate`
        itself cuts them to the chunk first, and they are then read from position 0: a defect of transformers 5.23.
        With generate=False a local layer lacks the span's keys that its cache dropped.
    """
    model = _model("gemma4_unified", window)
    return _rows(model, layer, {"mm_token_type_ids": token_types}, padding, cached, for_generate=generate)


def paligemma(
    token_types: torch.Tensor,
    *,
    version: Literal[1, 2],
    layer: Layer,
    window: int | None = None,
    padding: torch.Tensor | None = None,
    cached: int = 0,
) -> torch.Tensor:
    """PaliGemma 1 and 2: `PaliGemmaModel.forward` in `models/paligemma/modeling_paligemma.py`.

    token_types: the model's `token_type_ids`: 0 is the prefix (images, prompt and padding), 1 the suffix. All 0s of a
        sequence are one block, whether they touch or not.
    version: 1 (Gemma: global layers, no window) or 2 (Gemma 2: local and global layers).
    cached: above 0 the model ignores token_types: it is causal, unless raw `pixel_values` come with the chunk. They do
        not here (`generate` would cut the token types to the chunk, and they would be read from position 0).
    """
    if (version == 1) != (window is None) or (version == 1 and layer == "local"):
        raise ValueError("PaliGemma 1 has global layers and no window; PaliGemma 2 needs a window")
    model = _model(f"paligemma{version}", window)
    return _rows(model, layer, {"token_type_ids": token_types}, padding, cached)


def molmo2(token_types: torch.Tensor, *, padding: torch.Tensor | None = None, cached: int = 0) -> torch.Tensor:
    """Molmo 2: `Molmo2Model.forward` in `models/molmo2/modeling_molmo2.py`. All layers are global and alike.

    token_types: the model's `mm_token_type_ids`: 1 is a token of an image or of a video frame (patches and the column,
        start and end tokens). All 1s of a sequence are one block, whether they touch or not.
    cached: above 0 the model applies the block only to a chunk that brings image features. Here each chunk with a token
        of type 1 does, as in `generate(prefill_chunk_size=...)` with images encoded before.
    """
    model = _model("molmo2", None)
    return _rows(model, "global", {"mm_token_type_ids": token_types}, padding, cached)


@functools.cache
def _model(name: str, window: int | None) -> Any:
    """A tiny random model. Layer 0 is local and layer 1 global; without a window both are global."""
    model_type, text, rest = _CONFIGS[name]
    text = _SIZES | {"vocab_size": 16, "num_hidden_layers": 2} | text
    if window is not None:
        text |= {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.AutoConfig.for_model(model_type, text_config=text, **rest)
    return transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def _rows(
    model: Any,
    layer: Layer,
    token_types: dict[str, torch.Tensor],
    padding: torch.Tensor | None,
    cached: int,
    for_generate: bool = False,
) -> torch.Tensor:
    """Put the first `cached` tokens into a cache, run the rest, and give the rest's mask as the result of an oracle."""
    ((name, types),) = token_types.items()
    batch, seqlen_k = types.shape
    cache = transformers.DynamicCache(config=model.config) if cached else None
    mask = torch.empty(0)
    for start, end in ((0, cached), (cached, seqlen_k)) if cached else ((0, seqlen_k),):
        inputs: dict[str, Any] = {
            "attention_mask": None if padding is None else padding[:, :end].long(),
            "past_key_values": cache,
            name: types[:, :end],
        }
        if for_generate:
            shape_only = torch.empty(batch, end - start, 0)
            masks = model.create_masks_for_generate(model.config, shape_only, position_ids=None, **inputs)
            inputs["attention_mask"] = masks
        mask = _run(model, layer, inputs | _tokens(model, types[:, start:end]))
    result = torch.zeros(batch, seqlen_k - cached, seqlen_k, dtype=torch.bool)
    result[:, :, seqlen_k - mask.shape[-1] :] = mask[:, 0] == 0  # eager masks are added to the scores: 0 attends
    return result


def _tokens(model: Any, types: torch.Tensor) -> dict[str, Any]:
    """Text tokens; for Molmo 2, whose mask depends on it, images and their features where the type is 1."""
    ids = torch.ones_like(types)
    if model.config.model_type != "molmo2" or not (types == 1).any():
        return {"input_ids": ids}
    ids[types == 1] = _IMAGE_TOKEN
    features = torch.zeros(int((types == 1).sum()), _SIZES["hidden_size"])
    return {"input_ids": ids, "mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=[features])}}


@torch.no_grad()
def _run(model: Any, layer: Layer, inputs: dict[str, Any]) -> torch.Tensor:
    """The mask that the layer's attention gets in a forward of the model: `(batch, 1, seqlen_q, keys)` float."""
    seen: list[torch.Tensor] = []
    attention = model.model.language_model.layers[0 if layer == "local" else 1].self_attn
    hook = attention.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    try:
        model(**inputs, use_cache=inputs["past_key_values"] is not None)
    finally:
        hook.remove()
    return seen[0]
