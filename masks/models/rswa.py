"""R-SWA, sliding window with the prompt kept in sight (Unlimited-OCR): `causal & (prefix("prompt") | window(w))`.

The output sees the last `w` tokens and all of the prompt (page images and instruction); the prompt itself is causal. A
row sees at most two intervals: the prompt, and the window.

Spans: one named "prompt" per sequence, `(0, prompt length)`. Applied to all layers.

In transformers the prompt is the first pass that a cache sees, or as many tokens as `generate` says, padding included.
A forward without a cache is causal there: this mask, with a prompt as long as the sequence. Padding on the left of the
prompt is hidden until the cache drops tokens; from then on every dropped token uncovers one token of padding. That is a
defect of 5.24.0, which this mask does not have (`packing.in_documents` hides padding).

Source: `create_reference_sliding_window_causal_mask` in `models/unlimited_ocr/modeling_unlimited_ocr.py` of
transformers 5.24.0 (tests/masks/models/test_transformers.py runs it, and `generate`); 5.23.0 does not have the model.
vLLM 0.33.0, read: `_make_rswa_mask_mod` in `v1/attention/backends/flash_attn.py`.
"""

from __future__ import annotations

from fa4_prefixlm.masks.atoms import causal, prefix
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.models._window import sliding_window


def all_layers(window: int) -> Mask:
    """All layers.

    Args:
        window: tokens of output that stay in sight, the query's own included.

    Raises:
        InputError: `window` is no positive number of tokens.
    """
    return causal & (prefix("prompt") | sliding_window(window))
