"""Moondream 3: `causal | same_span("image")` on all layers.

Spans: one, at the start: the BOS token and the 729 tokens of the image, `IMAGE_SPAN`. A sequence without an image has
none.

Source: vLLM 0.33.0, read: `model_executor/models/moondream3.py` (the span), `compute_mm_prefix_ranges` in
`v1/attention/backends/utils.py`, `_make_mm_prefix_mask_mod` in `flash_attn.py` there. transformers 5.24.0 does not have
the model.
"""

from __future__ import annotations

from fa4_prefixlm.masks.atoms import causal, same_span
from fa4_prefixlm.masks.base import Mask

IMAGE_SPAN = (0, 730)


def all_layers() -> Mask:
    """All layers. The ranges of a batch of two with an image each are `[[IMAGE_SPAN], [IMAGE_SPAN]]`."""
    return causal | same_span("image")
