"""Exact PrefixLM attention at FlashAttention-4 speed: text runs causally, the tokens of an image see each other."""

from fa4_prefixlm.backends.select import Choice
from fa4_prefixlm.device_checks import debug
from fa4_prefixlm.errors import InputError, UnsupportedError
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.chunked_prefill import safe_chunk_end
from fa4_prefixlm.masks.prefix_lm import PrefixLM
from fa4_prefixlm.runtime.plans import Plan, plan
from fa4_prefixlm.runtime.public_call import attention
from fa4_prefixlm.runtime.serving_plans import ServingPlan, serving_plan

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
