"""Causal text whose spans (images, prompts) see themselves in both directions, with or without a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.errors import InputError
from fa4_prefixlm.mask import Mask, Reach, Rows


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Causal, except that the tokens of a span all see each other.

    window: sliding window in tokens, `query - key < window`, the query's own token included (`sliding_window` of
        transformers, `window_size_left = window - 1` of FlashAttention). It looks left only. None: no window.
    clamp: with a window, True is (causal or span) and window: a span longer than the window loses its far left keys
        (transformers: Gemma 3 and Gemma 4, `masking_utils.py`). False is (causal and window) or span: a span is
        always whole (vLLM: Gemma 3, `v1/attention/backends`). Without a window the two are the same.

    Example, window 4, span [2, 8), the row at position 7: `clamp=True` sees [4, 8), `clamp=False` sees [2, 8).
    """

    window: int | None = None
    clamp: bool = True

    def __post_init__(self) -> None:
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise InputError("window", "None or a positive number of tokens", self.window)

    def bounds(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        hi = torch.maximum(rows.position + 1, rows.span_end)
        if self.window is None:
            return torch.zeros_like(hi), hi
        lo = rows.position - (self.window - 1)
        if not self.clamp:
            lo = torch.minimum(lo, rows.span_start)
        return lo, hi

    def visible(self, q_pos: torch.Tensor, kv_pos: torch.Tensor, same_span: torch.Tensor) -> torch.Tensor:
        causal = kv_pos <= q_pos
        if self.window is None:
            return causal | same_span
        near = q_pos - kv_pos < self.window
        return ((causal | same_span) & near) if self.clamp else ((causal & near) | same_span)

    def reach(self, longest_span: int) -> Reach:
        right = max(1, longest_span)
        if self.window is None:
            return Reach(left=None, right=right)
        left = self.window - 1
        return Reach(left=left if self.clamp else max(left, longest_span), right=right)
