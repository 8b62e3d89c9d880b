"""Gemma 4 and Gemma 4 unified, where `text_config.use_bidirectional_attention` is "vision". (With None, the default of
Gemma 4's configuration, layers are `causal` and `causal & window(w)`.)

`text_config.layer_types` says which layer is which, `w` is `text_config.sliding_window`.

Gemma 4, in transformers and in vLLM:

- "full_attention": `causal`, and no spans to give.
- "sliding_attention": `(causal | same_span("image")) & window(w)`. Unlike Gemma 3's in vLLM, no span is dropped.

Gemma 4 unified has two masks in transformers. Name the one you mean:

- "transformers-static-cache", `generate` with a static cache: Gemma 4's two rules. "vllm" is the same.
- "transformers-forward", training and `generate` with its default cache: `causal | same_span("image")` and `(causal &
  window(w)) | same_span("image")`. In a chunk after a cache that only keeps a window, transformers lacks the keys of a
  span that the cache dropped; this mask has them.

Spans: the runs of 1 (image) and 2 (video) in `mm_token_type_ids`; runs that touch are one span. 3 (audio) is causal.
In vLLM each image and each frame of a video is a span of its own; its processor puts text tokens between them.

Source: `create_masks_for_vision_model` in `models/gemma4/modeling_gemma4.py`, `Gemma4UnifiedModel.forward` and
`create_masks_for_generate` in `models/gemma4_unified/modeling_gemma4_unified.py` of transformers 5.24.0
(tests/masks/models/test_transformers.py runs them; 5.23.0 has the same masks, and other packed rows: packing.py).
5.24.0 refuses flash attention for both models; 5.23.0 ran images causally with it, silently.
vLLM 0.33.0, read: `mm_prefix_clamp_sliding_window` and `_clear_mm_prefix_for_full_attn_layers` in
`model_executor/models/gemma4_mm.py`, which `gemma4_unified.py` inherits,
`Gemma4Attention` in `gemma4.py`, `_make_mm_prefix_mask_mod` in `v1/attention/backends/flash_attn.py`,
`compute_kv_seq_mask` in `v1/attention/ops/triton_attention_helpers.py`. Its FlexAttention backend ignores the clamp:
there a local layer is `(causal & window(w)) | same_span("image")` (`get_mask_mod` in `flex_attention.py`).
"""

from __future__ import annotations

from typing import Literal

import torch

from fa4_prefixlm.batch.lengths import CuSeqlens
from fa4_prefixlm.masks.atoms import causal, same_span
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.models._like import variant
from fa4_prefixlm.masks.models._window import sliding_window
from fa4_prefixlm.masks.spans import BatchSpans, read_spans

UnifiedLike = Literal["transformers-forward", "transformers-static-cache", "vllm"]


def global_layers(*, like: Literal["transformers", "vllm"] = "transformers") -> Mask:
    """Gemma 4's layers of type "full_attention".

    Args:
        like: need not be given, both programs have the same mask.

    Raises:
        InputError: `like` is no such program.
    """
    return variant(like, dict.fromkeys(("transformers", "vllm"), causal))


def local_layers(window: int, *, like: Literal["transformers", "vllm"] = "transformers") -> Mask:
    """Gemma 4's layers of type "sliding_attention".

    Args:
        window: sliding window in tokens, the query's own included.
        like: need not be given, both programs have the same mask.

    Raises:
        InputError: `window` is no positive number of tokens, or `like` is no such program.
    """
    return variant(like, dict.fromkeys(("transformers", "vllm"), _clipped(window)))


def unified_global_layers(*, like: UnifiedLike) -> Mask:
    """Gemma 4 unified's layers of type "full_attention".

    Args:
        like: the program to agree with, see above.

    Raises:
        InputError: `like` is no such program.
    """
    joined = causal | same_span("image")
    return variant(like, {"transformers-forward": joined, "transformers-static-cache": causal, "vllm": causal})


def unified_local_layers(window: int, *, like: UnifiedLike) -> Mask:
    """Gemma 4 unified's layers of type "sliding_attention".

    Args:
        window: sliding window in tokens, the query's own included.
        like: the program to agree with, see above.

    Raises:
        InputError: `window` is no positive number of tokens, or `like` is no such program.
    """
    clipped = _clipped(window)
    whole = (causal & sliding_window(window)) | same_span("image")
    return variant(like, {"transformers-forward": whole, "transformers-static-cache": clipped, "vllm": clipped})


def spans_from_token_types(
    token_types: torch.Tensor, *, cu_seqlens: CuSeqlens | None = None, max_spans: int | None = None
) -> BatchSpans | torch.Tensor:
    """Images and videos in `mm_token_type_ids`.

    Args:
        token_types: `(batch, seqlen)`, or packed `(total,)` with `cu_seqlens`; any integer dtype, on any device.
        cu_seqlens: `(batch + 1,)` int32, where packed sequences begin and end.
        max_spans: None: the tensor is read on the host, see `spans.runs_of`. A number: nothing waits for the device,
            and the spans are an int32 tensor there, `(batch, max_spans, 2)`, see `spans.runs_on_device`.

    Returns:
        per sequence a list of half-open `(start, end)`, ascending, in tokens from its start; with `max_spans` a tensor
        as above, unused rows `(0, 0)`.

    Raises:
        InputError: an argument is not as above, or a sequence has more than `max_spans` runs (on a GPU, an assertion
            there).
    """
    return read_spans(token_types, {1, 2}, cu_seqlens=cu_seqlens, max_spans=max_spans)


def _clipped(window: int) -> Mask:
    return (causal | same_span("image")) & sliding_window(window)
