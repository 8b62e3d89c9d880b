"""The window of a model's sliding layers."""

from __future__ import annotations

from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.atoms import window
from fa4_prefixlm.masks.base import Mask


def sliding_window(tokens: int) -> Mask:
    """`window(tokens)`. A layer without a window is a global one: None is a mistake here."""
    if tokens is None:
        raise InputError("window", "a positive number of tokens", None)
    return window(tokens)
