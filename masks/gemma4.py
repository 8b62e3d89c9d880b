"""Gemma 4 and Gemma 4 unified, where `text_config.use_bidirectional_attention` is "vision". (With None, the default of
Gemma 4's configuration, layers are `causal` and `causal & window(w)`.)

`text_config.layer_types` says which layer is which, `w` is `text_config.sliding_window`.

Gemma 4:
- "full_attention": `causal` in transformers, `causal | same_span("image")` in vLLM.
- "sliding_attention": `(causal | same_span("image")) & window(w)` in transformers, `(causal & window(w)) |
  same_span("image")` in vLLM.

Gemma 4 unified has two masks in transformers. Name the one you mean:
- "transformers-static-cache", `generate` with a static cache: Gemma 4's two rules.
- "transformers-forward", training and `generate` with its default cache: `causal | same_span("image")` and `(causal &
  window(w)) | same_span("image")`. In a chunk after a cache that keeps a window alone, transformers lacks the keys of a
  span that the cache dropped; this mask has them.
- "vllm": the same two rules, with vLLM's spans.

Spans: the runs of 1 (image) and 2 (video) in `mm_token_type_ids`; runs that touch are one span. 3 (audio) is causal.
vLLM leaves out spans longer than the window, on all layers: give its masks `drop_longer(spans, window)`. A mask that
is `causal` alone takes no spans.

Source: `create_masks_for_vision_model` in `models/gemma4/modeling_gemma4.py`, `Gemma4UnifiedModel.forward` and
`create_masks_for_generate` in `models/gemma4_unified/modeling_gemma4_unified.py` of transformers 5.23.0
(tests/test_catalogue.py runs them). vLLM 0.33: Gemma 3's rule, by reading of design notes, not checked here.
"""

from __future__ import annotations

from typing import Literal

import torch

from fa4_prefixlm.algebra import causal, same_span
from fa4_prefixlm.algebra import window as within
from fa4_prefixlm.mask import Mask

from ._like import variant
from .spans import BatchSpans, drop_longer, runs_of

__all__ = [
    "drop_longer",
    "global_layers",
    "local_layers",
    "spans_from_token_types",
    "unified_global_layers",
    "unified_local_layers",
]

UnifiedLike = Literal["transformers-forward", "transformers-static-cache", "vllm"]


def global_layers(*, like: Literal["transformers", "vllm"]) -> Mask:
    """Gemma 4's layers of type "full_attention"."""
    return variant(like, {"transformers": causal, "vllm": causal | same_span("image")})


def local_layers(window: int, *, like: Literal["transformers", "vllm"]) -> Mask:
    """Gemma 4's layers of type "sliding_attention"."""
    return variant(like, {"transformers": _clipped(window), "vllm": _whole(window)})


def unified_global_layers(*, like: UnifiedLike) -> Mask:
    """Gemma 4 unified's layers of type "full_attention"."""
    joined = causal | same_span("image")
    return variant(like, {"transformers-forward": joined, "transformers-static-cache": causal, "vllm": joined})


def unified_local_layers(window: int, *, like: UnifiedLike) -> Mask:
    """Gemma 4 unified's layers of type "sliding_attention"."""
    whole = _whole(window)
    rules = {"transformers-forward": whole, "transformers-static-cache": _clipped(window), "vllm": whole}
    return variant(like, rules)


def spans_from_token_types(token_types: torch.Tensor) -> BatchSpans:
    """Images and videos in `mm_token_type_ids` `(batch, seqlen)`. Reads the tensor on the host, see `spans.runs_of`."""
    return runs_of(token_types, {1, 2})


def _clipped(window: int) -> Mask:
    return (causal | same_span("image")) & within(window)


def _whole(window: int) -> Mask:
    return (causal & within(window)) | same_span("image")
