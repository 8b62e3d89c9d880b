"""Logprobs over the whole vocabulary: of transformers' eager attention, and of vLLM's outputs."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.integrations.vllm_engine.models import VOCABULARY


@torch.no_grad()
def expected(
    folder: str,
    ids: list[int],
    images: tuple[Any, ...],
    *,
    spans: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> torch.Tensor:
    """`(len(ids), vocabulary)` float32 on the CPU, row i for token i + 1.

    Args:
        folder: of the checkpoint.
        ids: all tokens, with images expanded as the engine does it.
        images: in the order of the tokens.
        spans: False: what a causal engine would say.
        dtype: of the model.
        device: of the model.
    """
    model, processor = _model(folder, dtype, device)
    tokens = torch.tensor([ids], device=device)
    kinds = (tokens == model.config.image_token_id).long() * spans
    if model.config.model_type == "paligemma":
        kinds = 1 - kinds  # 0 sees itself both ways: the prompt too in transformers, only the image in vLLM
    name = "mm_token_type_ids" if model.config.model_type == "gemma4" else "token_type_ids"
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), name: kinds}
    if images:
        made = processor.image_processor(images=list(images), return_tensors="pt")
        for key in ("pixel_values", "image_position_ids"):
            if key in made:
                given[key] = made[key].to(device=device, dtype=dtype if made[key].is_floating_point() else None)
    return model(**given).logits[0].float().log_softmax(-1).cpu()


def said(output: Any) -> tuple[list[int], torch.Tensor, int]:
    """(all tokens, logprobs, the token that the first row is for) of a `RequestOutput`.

    Prompt logprobs come first where they were asked for. The last token has no row after it.
    """
    prompt, answer = list(output.prompt_token_ids), output.outputs[0]
    entries, first = list(answer.logprobs), len(prompt)
    if output.prompt_logprobs is not None:
        entries, first = list(output.prompt_logprobs[1:]) + entries, 1
    rows = torch.full((len(entries), VOCABULARY), torch.nan)
    for row, entry in zip(rows, entries, strict=True):
        for token, own in entry.items():
            row[token] = own.logprob
    return prompt + list(answer.token_ids), rows, first


@functools.lru_cache(maxsize=8)
def _model(folder: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.backends.cudnn.allow_tf32 = False  # of the convolution that cuts an image into patches
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


def image_token(folder: str) -> int:
    """The token that stands for each of an image's tokens."""
    model, _ = _model(folder, torch.float32, "cpu")
    token: int = model.config.image_token_id
    return token
