"""Dense masks of models that transformers has since 5.24, or that no image model is: encoders, policies, canvases.

As in `oracles`, nothing here knows a mask rule: a tiny random model runs its own forward with eager attention, and the
mask that reached the attention of a layer is the result, bool `(batch, queries, keys)`, True attends. `padding` is bool
`(batch, keys)`, True is a real token; it hides keys. Layer 0 is local and layer 1 global.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 16,
}
LOCAL_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "image_size": 28,
    "patch_size": 14,
}
IMAGE = 5  # pi0's image token in the tiny vocabulary; 4 of them are an image
ROWS = {"local": 0, "global": 1}


def modernbert(padding: torch.Tensor, *, layer: str, local_attention: int) -> torch.Tensor:
    """ModernBERT."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    model = _model("modernbert", **sizes, **special, **LOCAL_GLOBAL, local_attention=local_attention)
    return _seen(model, f"layers.{ROWS[layer]}.attn", lambda: model(**_text(padding)), padding.shape[1], padding)


def embedding_gemma(padding: torch.Tensor, *, layer: str, sliding_window: int, version: int) -> torch.Tensor:
    """EmbeddingGemma 1, a Gemma 3 text model that sees both ways, and 2. sliding_window: the number in config.json."""
    if version == 1:
        kind, own = "gemma3_text", {"use_bidirectional_attention": True}
    else:
        kind, own = "embedding_gemma2_text", {"hidden_size_per_layer_input": 4, "embedding_dim": 16}
    model = _model(kind, **SIZES, **LOCAL_GLOBAL, sliding_window=sliding_window, **own)
    return _seen(model, f"layers.{ROWS[layer]}.self_attn", lambda: model(**_text(padding)), padding.shape[1], padding)


def t5gemma(padding: torch.Tensor, rows: int, *, part: str, layer: str, sliding_window: int) -> torch.Tensor:
    """T5Gemma. padding: of the encoder. rows: tokens of the decoder. part: "encoder", "decoder" or "cross"."""
    own = SIZES | LOCAL_GLOBAL | {"sliding_window": sliding_window}
    model = _model("t5gemma", encoder=own, decoder=own | {"cross_attention_hidden_size": 16})
    name = {"encoder": "encoder.layers.{}.self_attn", "decoder": "decoder.layers.{}.self_attn"}
    attention = name.get(part, "decoder.layers.{}.cross_attn").format(ROWS[layer])
    given = {**_text(padding), **_decoder(padding, rows), "use_cache": False}
    queries = padding.shape[1] if part == "encoder" else rows
    return _seen(model, attention, lambda: model(**given), queries, padding)


def t5gemma2(padding: torch.Tensor, rows: int, *, part: str, layer: str, sliding_window: int) -> torch.Tensor:
    """T5Gemma 2. part: "encoder", or "merged": keys are the decoder's, then the encoder's."""
    own = SIZES | LOCAL_GLOBAL | {"sliding_window": sliding_window}
    images = {"image_token_index": IMAGE, "boi_token_index": 6, "eoi_token_index": 7}
    encoder = {"text_config": own, "vision_config": VISION, **images}
    model = _model("t5gemma2", encoder=encoder, decoder=own, **images)
    name = "encoder.text_model.layers.{}.self_attn" if part == "encoder" else "decoder.layers.{}.self_attn"
    attention = name.format(ROWS[layer])
    given = {**_text(padding), **_decoder(padding, rows), "use_cache": False}
    queries = padding.shape[1] if part == "encoder" else rows
    return _seen(model, attention, lambda: model(**given), queries, padding)


def canvas(padding: torch.Tensor, rows: int, *, layer: str, window: int) -> torch.Tensor:
    """DiffusionGemma's decoder. padding: of the cached tokens. rows: tokens of the canvas.

    Result: keys are the cached tokens and the canvas; one that the layer's cache no longer has is False.
    """
    model, keys = _diffusion_gemma(window), padding.shape[1]
    real = torch.cat([padding.long(), torch.ones(len(padding), rows, dtype=torch.long)], dim=1)
    given = {**_text(padding), **_decoder(padding, rows), "decoder_attention_mask": real}
    attention = f"decoder.layers.{ROWS[layer]}.self_attn"
    own = _captured(model, attention, lambda: model(**given))
    if own is None:  # nothing is hidden: the shape tells what the cache has
        kept = min(keys, window - 1) if layer == "local" else keys
        own = torch.zeros(len(padding), 1, rows, kept + rows)
    result = torch.zeros(len(padding), rows, keys + rows, dtype=torch.bool)
    result[:, :, keys + rows - own.shape[3] :] = own[:, 0] == 0
    return result


def canvas_keys(keys: int, rows: int, *, layer: str, window: int) -> int:
    """How many keys the attention of a canvas has after `keys` cached tokens without padding."""
    model, seen = _diffusion_gemma(window), []
    attention = dict(model.named_modules())[f"decoder.layers.{ROWS[layer]}.self_attn"]
    kind = type(attention)
    whole = torch.ones(1, keys, dtype=torch.bool)
    original = kind.append_to_cache

    def watched(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if self is attention:
            seen.append(result[0].shape[2])
        return result

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(kind, "append_to_cache", watched)
        model(**_text(whole), **_decoder(whole, rows))
    return seen[0]


def diffusion_encoder(token_types: torch.Tensor, *, layer: str, window: int, generate: bool) -> torch.Tensor:
    """DiffusionGemma's encoder. generate: the masks that `generate` makes; False: what reaches the layers in forward.

    token_types: `mm_token_type_ids`, 1 image, 2 video.
    """
    model, whole = _diffusion_gemma(window), torch.ones(token_types.shape, dtype=torch.bool)
    if generate:
        masks = model.encoder.create_masks_for_generate(
            model.config,
            torch.empty(*token_types.shape, 0),
            attention_mask=None,
            cache=None,
            position_ids=torch.arange(token_types.shape[1])[None],
            mm_token_type_ids=token_types,
        )
        return masks["sliding_attention" if layer == "local" else "full_attention"][:, 0] == 0
    attention = f"encoder.language_model.layers.{ROWS[layer]}.self_attn"
    given = {**_text(whole), "mm_token_type_ids": token_types}
    return _seen(model, attention, lambda: model.encoder(**given), token_types.shape[1], whole)


def hrm_text(token_types: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """HRM-Text. token_types: 1 is a token of the prompt."""
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    model = _model("hrm_text", **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    given = {**_text(padding), "token_type_ids": token_types}
    return _seen(model, "L_module.layers.0.self_attn", lambda: model(**given), padding.shape[1], padding)


def pi0(padding: torch.Tensor, actions: int, *, expert: bool) -> torch.Tensor:
    """pi0. padding: of the prefix, whose first 4 tokens are an image. expert: of the action expert, not of the prefix.

    actions: tokens of the actions, the state not counted.
    """
    vlm = {
        "model_type": "paligemma",
        "text_config": {"model_type": "gemma", **SIZES},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "projection_dim": 16,
        "image_token_id": IMAGE,
    }
    model = _model("pi0", vlm_config=vlm, dit_config={"model_type": "gemma", **SIZES})
    batch, prefix = padding.shape
    ids = torch.ones(batch, prefix, dtype=torch.long)
    ids[:, :4] = IMAGE
    given = {
        "input_ids": ids,
        "attention_mask": padding.long(),
        "pixel_values": torch.zeros(batch, 1, 3, 28, 28),
        "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool),
        "action_embeds": torch.zeros(batch, 1 + actions, 16),
    }
    attention = "dit.layers.0.self_attn" if expert else "vlm.language_model.layers.0.self_attn"
    return _seen(model, attention, lambda: model(**given), 1 + actions if expert else prefix, padding)


def _diffusion_gemma(window: int) -> Any:
    experts = {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}
    text = {**SIZES, **LOCAL_GLOBAL, **experts, "global_head_dim": 16, "num_global_key_value_heads": 1}
    return _model(
        "diffusion_gemma",
        text_config=text | {"sliding_window": window, "use_bidirectional_attention": "vision"},
        canvas_length=4,
    )


_MODELS: dict[str, Any] = {}


def _model(kind: str, **configuration: Any) -> Any:
    """A tiny random model; one is made once."""
    key = f"{kind} {configuration}"
    if key not in _MODELS:
        config = transformers.AutoConfig.for_model(kind, **configuration)
        _MODELS[key] = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    return _MODELS[key]


def _text(padding: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones(padding.shape, dtype=torch.long), "attention_mask": padding.long()}


def _decoder(padding: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": torch.ones(len(padding), rows, dtype=torch.long)}


def _seen(model: Any, attention: str, call: Callable[[], object], rows: int, padding: torch.Tensor) -> torch.Tensor:
    mask = _captured(model, attention, call)
    if mask is None:  # eager attention without a mask sees every key; transformers spares the mask where it hides none
        return torch.ones(len(padding), rows, padding.shape[1], dtype=torch.bool)
    return mask[:, 0] == 0  # eager masks are added to the scores: 0 attends


@torch.no_grad()
def _captured(model: Any, attention: str, call: Callable[[], object]) -> torch.Tensor | None:
    """The mask that an attention module gets, the first time."""
    seen: list[torch.Tensor | None] = []

    def keep(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        names = [name for name in keywords if name.endswith("attention_mask")]
        seen.append(keywords[names[0]])

    hook = dict(model.named_modules())[attention].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return seen[0]
