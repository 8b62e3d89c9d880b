"""HRM-Text: a hierarchical recurrent text model with a bidirectional prompt, where `prefix_lm` is True.

All layers of both stacks: `causal | one_block("prefix")`. The tokens of the prompt see each other, wherever they are;
the answer is causal. One run of them, as an instruction is, is a span: `causal | same_span("prefix")`, which costs
less. Where `prefix_lm` is False, and without token types, layers are causal.

Spans: the 1s of `token_type_ids`. Only the first pass reads them: with a cache, transformers is causal, so later passes
get no spans.

Source: `HrmTextModel.forward` in `models/hrm_text/modeling_hrm_text.py` of transformers 5.24.0
(tests/masks/models/test_transformers_5_24.py runs it), which refuses flash attention for the model.
"""

from __future__ import annotations

import torch

from fa4_prefixlm.batch.integers import true_or_false
from fa4_prefixlm.batch.lengths import CuSeqlens
from fa4_prefixlm.masks.atoms import causal, one_block, same_span
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.spans import BatchSpans, read_spans


def all_layers(*, gaps: bool = False) -> Mask:
    """All layers.

    Args:
        gaps: the prompt of a row may be several runs.

    Raises:
        InputError: `gaps` is neither True nor False.
    """
    return causal | (one_block("prefix") if true_or_false("gaps", gaps) else same_span("prefix"))


def spans_from_token_types(
    token_types: torch.Tensor,
    *,
    gaps: bool = False,
    cu_seqlens: CuSeqlens | None = None,
    max_spans: int | None = None,
) -> BatchSpans | torch.Tensor:
    """The prompt in `token_type_ids`.

    Args:
        token_types: `(batch, seqlen)`, or packed `(total,)` with `cu_seqlens`; any integer dtype, on any device.
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
    return read_spans(token_types, {1}, cu_seqlens=cu_seqlens, max_spans=max_spans, joined=joined)
