"""R-SWA, sliding window with the prompt kept in sight (Unlimited-OCR): `causal & (prefix("prompt") | window(w))`.

The output sees the last `w` tokens and all of the prompt (page images and instruction); the prompt itself is causal. A
row sees at most two intervals: the prompt, and the window.

Spans: one of name "prompt" per sequence, `(0, prompt length)`. Applied to all layers.

Source: vLLM 0.33.0, read: `_make_rswa_mask_mod` in `v1/attention/backends/flash_attn.py`. transformers 5.23.0 does not
have it.
"""

from __future__ import annotations

from fa4_prefixlm.masks.atoms import causal, prefix
from fa4_prefixlm.masks.atoms import window as within
from fa4_prefixlm.masks.base import Mask


def all_layers(window: int) -> Mask:
    """window: tokens of output that stay in sight, the query's own included."""
    return causal & (prefix("prompt") | within(window))
