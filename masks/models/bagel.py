"""BAGEL, on all layers: `causal | same_span("image")` where it reads, and noised images besides where it is trained.

In training an image that is to be generated is in the sequence noised, to be denoised, and perhaps clean as well, for
later tokens to see. A noised image sees itself and all that is before it, but for other noised images, and nothing else
sees it: `training_layers()`. A row sees one interval more than there are noised images before it; that may be more than
kernels take (4), and `print(plan)` says what runs it then.

Spans: the token range of each image, from the program that lays out the sequence; in training "image" are those that
are clean (splits of mode "full" in BAGEL's data), "noised" those that are not (mode "noise").

Source: vLLM 0.33.0, read: `model_executor/models/bagel.py` (the spans), `compute_mm_prefix_ranges` in
`v1/attention/backends/utils.py`, `_make_mm_prefix_mask_mod` in `flash_attn.py` there. transformers 5.24.0 does not have
the model. Training: `create_sparse_mask` and `prepare_attention_mask_per_sample` in `data/data_utils.py` of BAGEL's
code, read; its samples, packed into a row, are sequences of their own here.
"""

from __future__ import annotations

from fa4_prefixlm.masks.atoms import causal, key_outside, same_span
from fa4_prefixlm.masks.base import Mask


def all_layers() -> Mask:
    """Text is causal, the tokens of an image see each other."""
    return causal | same_span("image")


def training_layers() -> Mask:
    """All layers in training, with noised images that are seen by themselves alone."""
    seen = causal | same_span("image") | same_span("noised")
    return seen & (key_outside("noised") | same_span("noised"))
