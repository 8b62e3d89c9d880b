"""The window of a model's sliding layers."""

from __future__ import annotations

from fa4_prefixlm.batch.integers import whole_number
from fa4_prefixlm.masks.atoms import window
from fa4_prefixlm.masks.base import Mask


def sliding_window(tokens: int, argument: str = "window") -> Mask:
    """`window(tokens)`; a layer without a window is a global one: None is a mistake here. argument: for errors."""
    return window(whole_number(argument, tokens, "a positive number of tokens", least=1))
