"""Gemma 3: causal text, the tokens of an image see each other; five local layers to a global one.

`text_config.layer_types` says which layer is which, `w` is `text_config.sliding_window`.

- "full_attention": `causal | same_span("image")`.
- "sliding_attention": `(causal | same_span("image")) & window(w)` in transformers, `(causal & window(w)) |
  same_span("image")` in vLLM. They differ where a span is longer than the window.

Spans: the runs of 1 in `token_type_ids`. The processor puts text tokens around each image, so images do not touch; if
they did, transformers would make one span of them. Decoding only adds text: the spans of the prompt stay as they are.
vLLM leaves out spans longer than the window, on all layers: give its masks `drop_longer(spans, window)`. On the spans
it keeps, the two local rules are the same mask. Only an image longer than the window differs: transformers clips it,
vLLM reads it as text. (An image has `mm_tokens_per_image` tokens, 256.)

Source: `create_masks_for_vision_model` and `get_block_sequence_ids_for_mask` in `models/gemma3/modeling_gemma3.py` of
transformers 5.24.0 (tests/masks/models/test_transformers.py runs them; 5.23.0 has the same masks, and other packed
rows: packing.py). 5.24.0 refuses flash attention for the model; 5.23.0 ran images causally with it, silently.
vLLM 0.33.0, read: `compute_mm_prefix_ranges` in `v1/attention/backends/utils.py` (what is dropped),
`_make_mm_prefix_mask_mod` in `v1/attention/backends/flash_attn.py` (the mask), `get_image_repl` in
`model_executor/models/gemma3_mm.py` (the spans), `Gemma3Attention` in `gemma3.py` (the window). Not this mask:
`use_bidirectional_attention=True`, which drops causality.
"""

from __future__ import annotations

from typing import Literal

import torch

from fa4_prefixlm.batch.lengths import CuSeqlens
from fa4_prefixlm.masks.atoms import causal, same_span
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.models._like import variant
from fa4_prefixlm.masks.models._window import sliding_window
from fa4_prefixlm.masks.spans import BatchSpans, drop_longer, read_spans

__all__ = ["drop_longer", "global_layers", "local_layers", "spans_from_token_types"]


def global_layers() -> Mask:
    """Layers of type "full_attention". One mask for transformers and vLLM; vLLM's spans are those of `drop_longer`."""
    return causal | same_span("image")


def local_layers(window: int, *, like: Literal["transformers", "vllm"]) -> Mask:
    """Layers of type "sliding_attention".

    Args:
        window: sliding window in tokens, the query's own included.
        like: "transformers" clips a span to the window. "vllm" keeps spans whole and leaves out those longer than the
            window: give that mask the spans of `drop_longer`.

    Raises:
        InputError: `window` is no positive number of tokens, or `like` is no such program.
    """
    return variant(
        like,
        {
            "transformers": (causal | same_span("image")) & sliding_window(window),
            "vllm": (causal & sliding_window(window)) | same_span("image"),
        },
    )


def spans_from_token_types(
    token_types: torch.Tensor, *, cu_seqlens: CuSeqlens | None = None, max_spans: int | None = None
) -> BatchSpans | torch.Tensor:
    """The images in `token_type_ids`.

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
    return read_spans(token_types, {1}, cu_seqlens=cu_seqlens, max_spans=max_spans)
