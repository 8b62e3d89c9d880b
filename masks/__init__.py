"""Masks, one family a file. Installed as `fa4_prefixlm.masks`."""

from .prefix_lm import PrefixLM

__all__ = ["PrefixLM"]
