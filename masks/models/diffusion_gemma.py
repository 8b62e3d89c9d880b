"""DiffusionGemma: an encoder that is Gemma 4's decoder, and a decoder that denoises a canvas over the encoder's cache.

`text_config.layer_types` says which layer is which, `w` is `text_config.sliding_window`.

The canvas, a block of `canvas_length` tokens after the `n` cached ones:

- "full_attention": every token of the canvas sees all of the cache and all of the canvas: `everything`, if the queries
  are the canvas alone.
- "sliding_attention": every token of the canvas sees the same `w - 1` cached tokens, the last ones, and all of the
  canvas: `same_span("canvas", before=w - 1)`. It is not a window of `w` around each token.

The encoder, where `use_bidirectional_attention` is "vision" (with None, `causal` and `causal & window(w)`), has two
masks in transformers. Name the one you mean:

- "transformers-generate", the masks that `generate` makes: `causal | same_span("image")` on "full_attention", `(causal
  & window(w)) | same_span("image")` on "sliding_attention".
- "transformers-forward", `DiffusionGemmaModel.forward` and training: `causal` and `causal & window(w)`. The model makes
  the masks above and drops them: a defect of 5.24.0.

With `canvas=True` the masks are for a batch in which some sequences encode and others denoise: what a token sees in an
image or a canvas is added to the encoder's mask.

Spans: "image", the runs of 1 and 2 in `mm_token_type_ids`; "canvas", one per sequence, `(n, n + canvas_length)`.

Source: `create_diffusion_decoder_attention_mask`, `DiffusionGemmaDecoderTextAttention.append_to_cache` and
`DiffusionGemmaEncoderModel` in `models/diffusion_gemma/modeling_diffusion_gemma.py` of transformers 5.24.0
(tests/masks/models/test_transformers_5_24.py runs them, with a dynamic cache).
"""

from __future__ import annotations

from typing import Literal

from fa4_prefixlm.batch.integers import true_or_false
from fa4_prefixlm.masks.atoms import causal, everything, same_span
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.models._like import variant
from fa4_prefixlm.masks.models._window import sliding_window
from fa4_prefixlm.masks.models.gemma4 import spans_from_token_types

__all__ = [
    "canvas_global_layers",
    "canvas_local_layers",
    "encoder_global_layers",
    "encoder_local_layers",
    "spans_from_token_types",
]

Like = Literal["transformers-generate", "transformers-forward"]


def canvas_global_layers() -> Mask:
    """Decoder layers of type "full_attention": queries are the canvas, keys the cache and the canvas."""
    return everything


def canvas_local_layers(window: int) -> Mask:
    """Decoder layers of type "sliding_attention".

    Args:
        window: the configuration's sliding window in tokens; `window - 1` cached tokens are seen.

    Raises:
        InputError: `window` is no positive number of tokens.
    """
    sliding_window(window)  # which checks it
    return same_span("canvas", before=window - 1)


def encoder_global_layers(*, like: Like, canvas: bool = False) -> Mask:
    """Encoder layers of type "full_attention".

    Args:
        like: the program to agree with, see above.
        canvas: sequences with a canvas may be in the batch. The cache before a canvas is seen as by causal tokens.

    Raises:
        InputError: `like` is no such program, or `canvas` is neither True nor False.
    """
    mask = variant(like, {"transformers-generate": causal | same_span("image"), "transformers-forward": causal})
    return mask | same_span("canvas") if true_or_false("canvas", canvas) else mask


def encoder_local_layers(window: int, *, like: Like, canvas: bool = False) -> Mask:
    """Encoder layers of type "sliding_attention".

    Args:
        window: sliding window in tokens, the query's own included.
        like: the program to agree with, see above.
        canvas: sequences with a canvas may be in the batch.

    Raises:
        InputError: `window` is no positive number of tokens, `like` is no such program, or `canvas` is neither True nor
            False.
    """
    near = causal & sliding_window(window)
    mask = variant(like, {"transformers-generate": near | same_span("image"), "transformers-forward": near})
    return mask | canvas_local_layers(window) if true_or_false("canvas", canvas) else mask
