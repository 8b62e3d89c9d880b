"""Causal text with spans (images, prompts) that see themselves in both directions, with or without a window."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.integers import true_or_false
from fa4_prefixlm.masks.atoms import Window, causal, same_span, window
from fa4_prefixlm.masks.base import Mask, ends_of
from fa4_prefixlm.masks.closed_form import RowEdges, edges_of
from fa4_prefixlm.masks.interval_lists import Intervals
from fa4_prefixlm.masks.protocols import Ahead, Ends, Pairs, Reach, Rows


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Causal, except that the tokens of a span all see each other.

    With window 4 and the span [2, 8), the row at position 7 sees [4, 8) if `clamp`, and [2, 8) if not.

    Attributes:
        window: sliding window in tokens, `query - key < window`, the query's own token included (`sliding_window` of
            transformers, `window_size_left = window - 1` of FlashAttention). It looks left only. None: no window.
        clamp: with a window, True is (causal or span) and window: a span longer than the window loses its far left
            keys (transformers: Gemma 3 and Gemma 4, `masking_utils.py`). False is (causal and window) or span: a span
            is always whole (vLLM: Gemma 3, `v1/attention/backends`). Without a window the two are the same.

    Raises:
        InputError: `window` is no positive number of tokens, or `clamp` is neither True nor False.
    """

    window: int | None = None
    clamp: bool = True
    around_position = no_empty_rows = True

    def __post_init__(self) -> None:
        if self.window is not None:
            checked = window(self.window)
            assert isinstance(checked, Window)
            object.__setattr__(self, "window", checked.left)  # a Python int, whatever integer was given
        true_or_false("clamp", self.clamp)

    @functools.cached_property
    def expression(self) -> Mask:
        """The same mask in the terms of the authoring API, its spans named "image"."""
        if self.window is None:
            return causal | same_span("image")
        if self.clamp:
            return (causal | same_span("image")) & window(self.window)
        return (causal & window(self.window)) | same_span("image")

    @functools.cached_property
    def names(self) -> frozenset[str]:
        return self.expression.names

    def count(self, spans: Mapping[str, int]) -> int:
        return self.expression.count(spans)

    def intervals(self, rows: Rows) -> Intervals:
        return self.expression.intervals(rows)

    @functools.cached_property
    def _ahead(self) -> Ahead:
        return self.expression.ahead()

    def ahead(self) -> Ahead:
        return self._ahead

    def ends(self) -> Ends | None:
        return ends_of(self.expression)

    def edges(self) -> RowEdges | None:
        return edges_of(self.expression)

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return self.expression.visible(pairs)

    def reach(self, longest: Mapping[str, int]) -> Reach:
        return self.expression.reach(longest)
