"""T5Gemma 1 and 2: an encoder that sees both ways, and a decoder with cross-attention to it.

`layer_types` of the encoder's and the decoder's configuration says which layer is which, `w` is its `sliding_window`.

- Encoder, "full_attention": `everything`. "sliding_attention": in T5Gemma `window(w + 1, w)`, in T5Gemma 2
  `window((w + 1) // 2, w // 2)`.
- T5Gemma's decoder, "full_attention": `causal`. "sliding_attention": `causal & window(w)`. Cross-attention:
  `everything`.
- T5Gemma 2's decoder has self- and cross-attention merged. "full_attention": `causal & (key_in("encoder") |
  same_span("decoder"))`. "sliding_attention": `causal & (key_in("encoder") | window(w) & same_span("decoder"))`.

The window of T5Gemma's encoder counts `w` tokens on each side; that of T5Gemma 2's is `w` tokens from end to end, the
token itself included, and one token longer on the left where `w` is odd.

T5Gemma 2's decoder attends in one softmax to its own keys and to the encoder's. Here the encoder's keys come first, so
that the queries are the last positions: keys `[encoder | decoder]`, while transformers concatenates them the other way
round, which makes no difference to attention. Ranges, `merged_ranges`: the encoder's tokens as one span, or as the
spans between its padding; the decoder's tokens as one span, as long as it may get.

Source: `T5GemmaEncoder` and `T5GemmaDecoder` in `models/t5gemma/modeling_t5gemma.py`, `T5Gemma2TextEncoder`,
`sliding_window_mask_function` and `T5Gemma2Decoder` in `models/t5gemma2/modeling_t5gemma2.py` of transformers 5.24.0
(tests/masks/models/test_transformers_5_24.py runs all of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fa4_prefixlm.batch.integers import whole_number, whole_numbers
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.atoms import causal, everything, key_in, same_span, window
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.models._window import sliding_window as looking_back
from fa4_prefixlm.masks.spans import BatchSpans


def encoder_global_layers() -> Mask:
    """Encoder layers of type "full_attention", and T5Gemma's cross-attention."""
    return everything


def encoder_local_layers(sliding_window: int, *, version: Literal[1, 2]) -> Mask:
    """Encoder layers of type "sliding_attention".

    Args:
        sliding_window: the configuration's number, in tokens.
        version: 1 or 2, which count it in two ways.

    Raises:
        InputError: `sliding_window` is no positive number of tokens, or `version` is neither 1 nor 2.
    """
    tokens = whole_number("sliding_window", sliding_window, "a positive number of tokens", least=1)
    if type(version) is not int or version not in (1, 2):
        raise InputError("version", "1 or 2", repr(version))
    return window(tokens + 1, tokens) if version == 1 else window((tokens + 1) // 2, tokens // 2)


def decoder_global_layers() -> Mask:
    """Self-attention of T5Gemma's decoder layers of type "full_attention"."""
    return causal


def decoder_local_layers(sliding_window: int) -> Mask:
    """Self-attention of T5Gemma's decoder layers of type "sliding_attention".

    Args:
        sliding_window: the configuration's number, in tokens.

    Raises:
        InputError: `sliding_window` is no positive number of tokens.
    """
    return causal & looking_back(sliding_window, "sliding_window")


def merged_global_layers() -> Mask:
    """The merged self- and cross-attention of T5Gemma 2's decoder layers of type "full_attention"."""
    return causal & (key_in("encoder") | same_span("decoder"))


def merged_local_layers(sliding_window: int) -> Mask:
    """The merged self- and cross-attention of T5Gemma 2's decoder layers of type "sliding_attention".

    Args:
        sliding_window: the configuration's number, in tokens. It limits what the decoder sees of itself.

    Raises:
        InputError: `sliding_window` is no positive number of tokens.
    """
    return causal & (key_in("encoder") | looking_back(sliding_window, "sliding_window") & same_span("decoder"))


def merged_ranges(encoder_lengths: Sequence[int], decoder_lengths: Sequence[int]) -> dict[str, BatchSpans]:
    """The ranges of keys `[encoder | decoder]` without padding in the encoder's.

    `merged_ranges([5], [3])` is `{"encoder": [[(0, 5)]], "decoder": [[(5, 8)]]}`.

    Args:
        encoder_lengths: tokens of the encoder, per sequence.
        decoder_lengths: tokens of the decoder, those to come included if the ranges are to stay for all steps.

    Returns:
        "encoder" and "decoder", each per sequence a list of one half-open `(start, end)` of key positions, or of none.

    Raises:
        InputError: the lengths are no numbers of tokens, or not as many of one as of the other.
    """
    encoders = whole_numbers("encoder_lengths", encoder_lengths, "a number of tokens, at least 0")
    decoders = whole_numbers("decoder_lengths", decoder_lengths, "a number of tokens, at least 0")
    if len(encoders) != len(decoders):
        raise InputError("decoder_lengths", f"{len(encoders)} numbers, one per sequence", len(decoders))
    ranges: dict[str, BatchSpans] = {"encoder": [], "decoder": []}
    for encoder, decoder in zip(encoders, decoders, strict=True):
        ranges["encoder"].append([(0, encoder)] if encoder else [])
        ranges["decoder"].append([(encoder, encoder + decoder)] if decoder else [])
    return ranges
