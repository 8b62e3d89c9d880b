"""PaliGemma 1 and 2: the prefix (image and prompt) sees itself in both directions, the suffix (answer) is causal.

- All layers of PaliGemma 1, and those of PaliGemma 2 that `text_config.layer_types` calls "full_attention": `causal |
  same_span("prefix")` in transformers. `causal | same_span("image")` in vLLM: there the prompt is causal.
- "sliding_attention" of PaliGemma 2, `w` is `text_config.sliding_window`: `(causal & window(w)) | same_span("prefix")`
  in transformers. `(causal & window(w)) | same_span("image")` in vLLM.

Spans in transformers: the 0s of `token_type_ids`; the suffix is 1. The 0s of a row all see each other, wherever they
are. The processor writes them as one run, and then `same_span` is enough; with `gaps=True` the masks have
`one_block("prefix")` instead, which takes any row and costs more. Padding is 0 as well: give `attention_mask` to leave
it out.
Only the first pass reads the types: with a cache, transformers is causal, so later passes get no spans.
Spans in vLLM: the range of the tokens of each image, for a single one `(0, n)`, or `(1, 1 + n)` where the tokenizer
adds BOS. For PaliGemma 2, on all layers, without those longer than the window: `drop_longer(spans, window)`.

Source: `PaliGemmaModel.forward` in `models/paligemma/modeling_paligemma.py` of transformers 5.24.0
(tests/masks/models/test_transformers.py runs it; 5.23.0 has the same masks, and other packed rows: packing.py). 5.24.0
refuses flash attention for the model; 5.23.0 ran the prefix causally with it, silently.
vLLM 0.33.0, read: `PaliGemmaMultiModalProcessor` in
`model_executor/models/paligemma.py` (the spans), `Gemma2Attention` in `gemma2.py` (the window),
`compute_mm_prefix_ranges` in `v1/attention/backends/utils.py`, `_make_mm_prefix_mask_mod` in `flash_attn.py` there.
"""

from __future__ import annotations

from typing import Literal

import torch

from fa4_prefixlm.batch.integers import true_or_false
from fa4_prefixlm.batch.lengths import CuSeqlens
from fa4_prefixlm.masks.atoms import causal, one_block, same_span
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.models._like import variant
from fa4_prefixlm.masks.models._window import sliding_window
from fa4_prefixlm.masks.spans import BatchSpans, read_spans, without_padding


def global_layers(*, like: Literal["transformers", "vllm"], gaps: bool = False) -> Mask:
    """All layers of PaliGemma 1, and those of type "full_attention" of PaliGemma 2.

    Args:
        like: the program to agree with.
        gaps: the prefix of a row may be several runs; for transformers only.

    Raises:
        InputError: `like` is no such program, or `gaps` is neither True nor False.
    """
    return variant(like, {"transformers": causal | _prefix(gaps), "vllm": causal | same_span("image")})


def local_layers(window: int, *, like: Literal["transformers", "vllm"], gaps: bool = False) -> Mask:
    """Layers of type "sliding_attention" of PaliGemma 2.

    Args:
        window: sliding window in tokens, the query's own included.
        like: the program to agree with.
        gaps: the prefix of a row may be several runs; for transformers only.

    Raises:
        InputError: `window` is no positive number of tokens, `like` is no such program, or `gaps` is neither True nor
            False.
    """
    near = causal & sliding_window(window)
    return variant(like, {"transformers": near | _prefix(gaps), "vllm": near | same_span("image")})


def spans_from_token_types(
    token_types: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    gaps: bool = False,
    cu_seqlens: CuSeqlens | None = None,
    max_spans: int | None = None,
) -> BatchSpans | torch.Tensor:
    """The prefix of each row of `token_type_ids`.

    Args:
        token_types: `(batch, seqlen)`, or packed `(total,)` with `cu_seqlens`; any integer dtype, on any device; 0 is
            the prefix.
        attention_mask: of the same shape and on the same device, any dtype; 0 is padding, which is then in no span.
        gaps: take a row with several runs, for masks made with `gaps=True`.
        cu_seqlens: `(batch + 1,)` int32, where packed sequences begin and end.
        max_spans: None: the tensor is read on the host, see `spans.runs_of`. A number: nothing waits for the device,
            and the spans are an int32 tensor there, `(batch, max_spans, 2)`, see `spans.runs_on_device`; without
            `gaps` its width is 1.

    Returns:
        per sequence a list of half-open `(start, end)`, ascending, in tokens from its start; with `max_spans` a tensor
        as above, unused rows `(0, 0)`.

    Raises:
        InputError: an argument is not as above; or a row has several runs, and `gaps` is False, or more than
            `max_spans` of them (with `max_spans` on a GPU, an assertion there).
    """
    joined = not true_or_false("gaps", gaps)
    if attention_mask is not None:
        token_types = without_padding(token_types, attention_mask, packed=cu_seqlens is not None)
    return read_spans(token_types, {0}, cu_seqlens=cu_seqlens, max_spans=max_spans, joined=joined)


def _prefix(gaps: bool) -> Mask:
    return one_block("prefix") if true_or_false("gaps", gaps) else same_span("prefix")
