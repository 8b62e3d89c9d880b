"""The prefix language model of the T5 paper: `causal | same_span("prefix")` on all layers.

The input sees itself in both directions, the target is causal and sees all of the input. One decoder, one sequence:
input, then target. (The released T5 is an encoder and a decoder; its paper compares that with this.)

Spans: one named "prefix" per sequence, `(0, input length)`: `spans_from_lengths`.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section
3.2.1 (arXiv 1910.10683). No model of transformers 5.24.0 is compared with it here.
"""

from __future__ import annotations

from collections.abc import Sequence

from fa4_prefixlm.batch.integers import whole_numbers
from fa4_prefixlm.masks.atoms import causal, same_span
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.spans import BatchSpans


def prefix_lm() -> Mask:
    """Bidirectional input, causal target."""
    return causal | same_span("prefix")


def spans_from_lengths(input_lengths: Sequence[int]) -> BatchSpans:
    """The input of each sequence as a span. `[5, 0, 9]` gives `[[(0, 5)], [], [(0, 9)]]`.

    Args:
        input_lengths: tokens of each input.

    Returns:
        per sequence a list of one half-open `(start, end)`, or of none.

    Raises:
        InputError: `input_lengths` are no numbers of tokens.
    """
    known = whole_numbers("input_lengths", input_lengths, "a number of tokens")
    return [[(0, length)] if length else [] for length in known]
