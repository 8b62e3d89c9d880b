"""Exact PrefixLM attention at FlashAttention-4 speed: text runs causally, the tokens of an image see each other."""

from .attention import attention
from .backends import Choice
from .debugging import debug
from .errors import InputError, UnsupportedError
from .mask import Mask
from .masks import PrefixLM
from .plan import Plan, plan

__version__ = "0.1.0"

__all__ = ["Choice", "InputError", "Mask", "Plan", "PrefixLM", "UnsupportedError", "attention", "debug", "plan"]
