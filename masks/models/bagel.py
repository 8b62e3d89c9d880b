"""BAGEL: `causal | same_span("image")` on all layers.

Spans: the token range of each image, from the program that lays out the sequence.

Source: vLLM 0.33.0, read: `model_executor/models/bagel.py` (the spans), `compute_mm_prefix_ranges` in
`v1/attention/backends/utils.py`, `_make_mm_prefix_mask_mod` in `flash_attn.py` there. transformers 5.24.0 does not have
the model. BAGEL's training code also hides a noised image from later tokens; this mask does not.
"""

from __future__ import annotations

from fa4_prefixlm.masks.atoms import causal, same_span
from fa4_prefixlm.masks.base import Mask


def all_layers() -> Mask:
    """Text is causal, the tokens of an image see each other."""
    return causal | same_span("image")
