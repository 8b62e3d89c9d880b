"""Exact PrefixLM attention at FlashAttention-4 speed: text runs causally, the tokens of an image see each other."""

from .attention import attention
from .backends import Choice
from .chunks import safe_chunk_end
from .debugging import debug
from .errors import InputError, UnsupportedError
from .mask import Mask
from .masks import PrefixLM
from .plan import Plan, plan
from .serving import ServingPlan, serving_plan

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "InputError",
    "Mask",
    "Plan",
    "PrefixLM",
    "ServingPlan",
    "UnsupportedError",
    "attention",
    "debug",
    "plan",
    "safe_chunk_end",
    "serving_plan",
]
