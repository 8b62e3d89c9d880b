"""Molmo 2: causal text; image and video tokens see each other in both directions. All layers are global and alike.

- transformers: `causal | one_block("image")`. All images and frames of a sequence are one block.
- vLLM: `causal | same_span("image")`. Each image and each frame of a video is by itself.

Spans: the runs of 1 in `mm_token_type_ids` (patches, and the column, start and end tokens of an image or a frame).
Images that touch make one run: no difference to `one_block`, but for vLLM give each to `plan` as a span of its own.
In transformers a pass after the first applies the block only if it brings image features.

Source: `Molmo2Model.forward` in `models/molmo2/modeling_molmo2.py` of transformers 5.24.0
(tests/masks/models/test_transformers.py runs it; 5.23.0 has the same mask, and other packed rows: packing.py). 5.24.0
refuses flash attention for the model; 5.23.0 ran images causally with it, silently.
vLLM 0.33.0, read: `emb_tok_ids` in `model_executor/models/molmo2.py` (a run of these tokens is a span),
`compute_mm_prefix_ranges` in `v1/attention/backends/utils.py`, `_make_mm_prefix_mask_mod` in `flash_attn.py` there.
"""

from __future__ import annotations

from typing import Literal

import torch

from fa4_prefixlm.batch.lengths import CuSeqlens
from fa4_prefixlm.masks.atoms import causal, one_block, same_span
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.models._like import variant
from fa4_prefixlm.masks.spans import BatchSpans, read_spans


def all_layers(*, like: Literal["transformers", "vllm"]) -> Mask:
    """All layers.

    Args:
        like: "transformers" makes one block of all images of a sequence, "vllm" a span of each image or frame.

    Raises:
        InputError: `like` is no such program.
    """
    return variant(like, {"transformers": causal | one_block("image"), "vllm": causal | same_span("image")})


def spans_from_token_types(
    token_types: torch.Tensor, *, cu_seqlens: CuSeqlens | None = None, max_spans: int | None = None
) -> BatchSpans | torch.Tensor:
    """Image runs in `mm_token_type_ids`.

    Args:
        token_types: `(batch, seqlen)`, or packed `(total,)` with `cu_seqlens`; any integer dtype, on any device.
        cu_seqlens: `(batch + 1,)` int32, where packed sequences begin and end.
        max_spans: None: the tensor is read on the host, see `spans.runs_of`. A number: nothing waits for the device,
            and the spans are an int32 tensor there, `(batch, max_spans, 2)`, see `spans.runs_on_device`.

    Returns:
        per sequence a list of half-open `(start, end)`, ascending, in tokens from its start; with `max_spans` a tensor
        as above, unused rows `(0, 0)`.

    Raises:
        InputError: an argument is not as above, or a sequence has more than `max_spans` runs (on a GPU, an assertion
            there).
    """
    return read_spans(token_types, {1}, cu_seqlens=cu_seqlens, max_spans=max_spans)
