"""Dense masks as Hugging Face transformers builds them, one function a model. Written against transformers 5.24.0.

Runs on 5.23.0 too, which has no model with R-SWA and another rule for packed rows.

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
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from packaging.version import Version

transformers = pytest.importorskip("transformers", minversion="5.23")

SINCE_5_24 = Version(transformers.__version__).release >= (5, 24)

Layer = Literal["local", "global"]

_CACHE = "cache" if SINCE_5_24 else "past_key_values"  # the argument's name
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
_UNLIMITED_OCR = {
    "vision_config": {
        "sam_config": _SIZES | {"num_hidden_layers": 1, "output_channels": 4, "downsample_channels": [8, 8]},
        "encoder_config": _SIZES | {"num_hidden_layers": 1, "image_size": 28},
    },
    "image_token_id": _IMAGE_TOKEN,
}
_UNLIMITED_OCR_TEXT = {
    "layer_types": ["reference_sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "dense"],
}
# Per model: transformers' model type, what its text configuration adds to the common one, the other configurations.
_CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3", {}, _SIGLIP),
    "gemma4": ("gemma4", _GEMMA4, {}),
    "gemma4_unified": ("gemma4_unified", _GEMMA4, {}),
    "paligemma1": ("paligemma", {"model_type": "gemma"}, _SIGLIP),
    "paligemma2": ("paligemma", {"model_type": "gemma2"}, _SIGLIP),
    "molmo2": ("molmo2", {}, _MOLMO2),
    "unlimited_ocr": ("unlimited_ocr", _UNLIMITED_OCR_TEXT, _UNLIMITED_OCR),
}
_TOKEN_TYPES = {"gemma3": "token_type_ids", "paligemma1": "token_type_ids", "paligemma2": "token_type_ids"}


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
        itself cuts them to the chunk first, and they are then read from position 0: a defect of transformers 5.23
        and 5.24.
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


def packed(
    name: str, token_types: torch.Tensor, positions: torch.Tensor, *, layer: Layer, window: int | None = None
) -> torch.Tensor:
    """Documents packed into each row, as in training: no attention mask, no cache, and position ids that restart.

    name: a key of `_CONFIGS` other than "unlimited_ocr".
    token_types: as for the oracle of that name.
    positions: `(batch, seqlen_k)` int64, the model's `position_ids`. A document starts where a position is not the one
        before plus 1 (`find_packed_sequence_indices` in `masking_utils.py`).
    """
    types = {_TOKEN_TYPES.get(name, "mm_token_type_ids"): token_types}
    return _rows(_model(name, window), layer, types, None, 0, positions=positions)


def rswa(
    seqlen_k: int, *, prompt: int, window: int, padding: torch.Tensor | None = None, cached: int = 0
) -> torch.Tensor:
    """R-SWA: `create_reference_sliding_window_causal_mask` in `models/unlimited_ocr/modeling_unlimited_ocr.py`.

    prompt: how many tokens, padding included, are the prompt. The cache is told, as `generate` tells it.
    Result: a key of the output that the cache no longer has is False; the prompt is always there.
    """
    model = _model("unlimited_ocr", window)
    batch = 1 if padding is None else padding.shape[0]
    cache = transformers.DynamicCache(config=model.config)
    cache.layers[0].set_prefill_length(prompt)
    mask = torch.empty(0)
    for start, end in ((0, cached), (cached, seqlen_k)) if cached else ((0, seqlen_k),):
        inputs: dict[str, Any] = {
            "attention_mask": None if padding is None else padding[:, :end].long(),
            "input_ids": torch.ones(batch, end - start, dtype=torch.long),
            _CACHE: cache,
        }
        mask = _run(model, "local", inputs)
    return _with_prompt(mask, prompt, seqlen_k)


def rswa_without_cache(seqlen_k: int, *, window: int) -> torch.Tensor:
    """As `rswa`, of a forward that has no cache to tell it the prompt."""
    inputs = {"attention_mask": None, "input_ids": torch.ones(1, seqlen_k, dtype=torch.long), _CACHE: None}
    return _run(_model("unlimited_ocr", window), "local", inputs)[:, 0] == 0


def rswa_generate(seqlen_k: int, *, prompt: int, window: int, chunk: int | None = None) -> torch.Tensor:
    """As `rswa`, of all passes of one `generate`: the prompt (in chunks of `chunk` tokens), then token by token."""
    model = _model("unlimited_ocr", window)
    new = seqlen_k - prompt + 1  # the last one is not run
    masks = _masks(
        model,
        "local",
        lambda: model.generate(
            torch.ones(1, prompt, dtype=torch.long),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            prefill_chunk_size=chunk,
        ),
    )
    ends = torch.tensor([mask.shape[2] for mask in masks]).cumsum(0).tolist()
    assert ends[-1] == seqlen_k
    rows = [_with_prompt(mask, prompt, end) for mask, end in zip(masks, ends, strict=True)]
    return torch.cat([torch.nn.functional.pad(own, (0, seqlen_k - own.shape[2])) for own in rows], dim=1)


def mask_of_flash_attention(name: str, token_types: torch.Tensor, *, window: int | None) -> torch.Tensor | None:
    """What the attention of a model gets whose text configuration says flash attention, which does not run here."""

    class Stop(Exception): ...

    def stop(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["attention_mask"])
        raise Stop

    seen: list[torch.Tensor | None] = []
    model = from_configuration(configuration(name, window), "eager")
    model.config.text_config._attn_implementation = "flash_attention_4"
    model.model.language_model.layers[0].self_attn.register_forward_pre_hook(stop, with_kwargs=True)
    types = {_TOKEN_TYPES.get(name, "mm_token_type_ids"): token_types}
    with torch.no_grad(), pytest.raises(Stop):
        model(**types, **_tokens(model, token_types), use_cache=False)
    return seen[0]


def configuration(name: str, window: int | None = None) -> Any:
    """The tiny configuration of a model, a key of `_CONFIGS`."""
    model_type, own, rest = _CONFIGS[name]
    text = _SIZES | {"vocab_size": 16, "num_hidden_layers": 2}
    if window is not None:
        text |= {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.AutoConfig.for_model(model_type, text_config=text | own, **rest)


def from_configuration(config: Any, attention: str) -> Any:
    """A model with random weights; `attention` is what transformers calls `attn_implementation`."""
    return transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()


@functools.cache
def _model(name: str, window: int | None) -> Any:
    """A tiny random model. Layer 0 is local and layer 1 global; without a window both are global."""
    return from_configuration(configuration(name, window), "eager")


def _rows(
    model: Any,
    layer: Layer,
    token_types: dict[str, torch.Tensor],
    padding: torch.Tensor | None,
    cached: int,
    for_generate: bool = False,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Put the first `cached` tokens into a cache, run the rest, and give the rest's mask as the result of an oracle."""
    ((name, types),) = token_types.items()
    batch, seqlen_k = types.shape
    cache = transformers.DynamicCache(config=model.config) if cached else None
    mask = torch.empty(0)
    for start, end in ((0, cached), (cached, seqlen_k)) if cached else ((0, seqlen_k),):
        inputs: dict[str, Any] = {
            "attention_mask": None if padding is None else padding[:, :end].long(),
            _CACHE: cache,
            name: types[:, :end],
        }
        if positions is not None:
            inputs["position_ids"] = positions[:, start:end]
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


def _with_prompt(mask: torch.Tensor, prompt: int, seqlen_k: int) -> torch.Tensor:
    """The result of an oracle, from a mask whose keys are the prompt and the last of the other tokens."""
    result = torch.zeros(mask.shape[0], mask.shape[2], seqlen_k, dtype=torch.bool)
    kept = mask.shape[3] - prompt
    visible = mask[:, 0] == 0
    if kept <= 0:  # not yet all of the prompt
        result[:, :, : mask.shape[3]] = visible
        return result
    result[:, :, :prompt] = visible[:, :, :prompt]
    result[:, :, seqlen_k - kept :] = visible[:, :, prompt:]
    return result


def _run(model: Any, layer: Layer, inputs: dict[str, Any]) -> torch.Tensor:
    """The mask that the layer's attention gets in a forward of the model: `(batch, 1, seqlen_q, keys)` float."""
    (mask,) = _masks(model, layer, lambda: model(**inputs, use_cache=inputs[_CACHE] is not None))
    return mask


@torch.no_grad()
def _masks(model: Any, layer: Layer, call: Callable[[], object]) -> list[torch.Tensor]:
    """What the layer's attention gets in all passes of `call`."""
    seen: list[torch.Tensor] = []
    attention = model.model.language_model.layers[0 if layer == "local" else 1].self_attn
    hook = attention.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    try:
        call()
    finally:
        hook.remove()
    return seen
