"""The choice between programs that give one model different masks."""

from __future__ import annotations

from collections.abc import Mapping

from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.base import Mask


def variant(like: str, rules: Mapping[str, Mask]) -> Mask:
    """The rule of the program `like`."""
    if not isinstance(like, str) or like not in rules:
        raise InputError("like", f"the program to agree with: {' or '.join(map(repr, rules))}", repr(like))
    return rules[like]
