"""Sink tokens and a window (StreamingLLM): `causal & (prefix("sink") | window(w))` on all layers.

A token sees the first few tokens of the sequence, the sinks, and the last `w`. Two intervals a row at most. (Learned
sinks, one more logit in each head's softmax, are no mask: the argument `learnable_sink` of a call.)

Spans: `sinks(batch, tokens)`, `(0, tokens)` in every sequence.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453), figure 1. Its cache
also numbers the positions anew, by their place in the cache; that is the model's business, not the mask's.
"""

from __future__ import annotations

from fa4_prefixlm.batch.integers import whole_number
from fa4_prefixlm.masks.atoms import causal, prefix
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.models._window import sliding_window
from fa4_prefixlm.masks.spans import BatchSpans


def all_layers(window: int) -> Mask:
    """All layers.

    Args:
        window: tokens that stay in sight besides the sinks, the query's own included.

    Raises:
        InputError: `window` is no positive number of tokens.
    """
    return causal & (prefix("sink") | sliding_window(window))


def sinks(batch: int, tokens: int) -> BatchSpans:
    """The first `tokens` tokens of each of `batch` sequences; a sequence must not be shorter.

    Args:
        batch: sequences.
        tokens: sink tokens of a sequence.

    Returns:
        `[(0, tokens)]` for each sequence, half-open.

    Raises:
        InputError: `batch` is no number of sequences, or `tokens` no positive number of tokens.
    """
    tokens = whole_number("tokens", tokens, "a positive number of tokens", least=1)
    return [[(0, tokens)] for _ in range(whole_number("batch", batch, "a number of sequences"))]
