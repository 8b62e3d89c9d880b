"""Exact PrefixLM attention for models of Hugging Face transformers, by one argument.

    import fa4_prefixlm.integrations.transformers  # registers "fa4_prefixlm"

    model = AutoModelForImageTextToText.from_pretrained(name, attn_implementation="fa4_prefixlm")

Prefill, `generate`, training and `torch.compile` then run through this library wherever it has a kernel for them, and
through SDPA, with a warning that says so, where it has not. docs/transformers.md has what runs where.

Importing this module needs transformers 5.23 or 5.24. Nothing of transformers is patched.
"""

from __future__ import annotations

import warnings

import transformers
from packaging.version import Version

NAME = "fa4_prefixlm"
OLDEST, NEWEST = "5.23", "5.24"

_version = Version(transformers.__version__)
if _version.release[:2] < Version(OLDEST).release:
    raise ImportError(
        f"fa4_prefixlm.integrations.transformers needs transformers {OLDEST} or {NEWEST}, and this is "
        f"{transformers.__version__}: pip install -U transformers"
    )
if _version.release[:2] > Version(NEWEST).release:
    warnings.warn(
        f"fa4_prefixlm.integrations.transformers was tested with transformers {OLDEST} to {NEWEST}, and this is "
        f"{transformers.__version__}. Mask functions that it does not know are evaluated pair by pair: exact, slower",
        stacklevel=2,
    )

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from fa4_prefixlm.integrations.transformers import compiled  # noqa: E402, F401 (defines the operation)
from fa4_prefixlm.integrations.transformers.layer_attention import attention  # noqa: E402
from fa4_prefixlm.integrations.transformers.masks import mask  # noqa: E402

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)

__all__ = ["NAME", "attention", "mask"]
