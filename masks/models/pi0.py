"""pi0, a policy: a prefix of images and text, a token of the robot's state, and the actions to denoise.

The prefix goes through PaliGemma and fills a cache; then the action expert runs the state and the actions over it:

- the prefix sees itself in both directions: `everything` with the prefix as a sequence of its own;
- the state sees the prefix and itself, the actions see the prefix, the state and each other:
  `causal | same_span("action")`, `expert_layers()`. One interval a row;
- padding inside of the prefix (a camera that is not there, a short prompt) is hidden from all: `& key_in("real")`,
  `expert_layers(padding=True)`. As many intervals a row as there are runs of real tokens.

All layers are alike. Spans, `ranges(attention_mask, actions)`: "action" is the actions, "real" the runs of tokens that
are no padding, those of the expert included.

Source: `PI0Model.forward` in `models/pi0/modeling_pi0.py` of transformers 5.24.0
(tests/masks/models/test_transformers_5_24.py runs it), which refuses flash attention for the model.
"""

from __future__ import annotations

import torch

from fa4_prefixlm.batch.integers import true_or_false, whole_number
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.atoms import causal, everything, key_in, same_span
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.spans import BatchSpans, runs_of


def prefix_layers(*, padding: bool = False) -> Mask:
    """All layers of PaliGemma, over the prefix.

    Args:
        padding: there is padding inside of the prefix, given as in `expert_layers`.

    Raises:
        InputError: `padding` is neither True nor False.
    """
    return key_in("real") if true_or_false("padding", padding) else everything


def expert_layers(*, padding: bool = False) -> Mask:
    """All layers of the action expert: queries are the state and the actions, keys the prefix and those.

    Args:
        padding: there is padding inside of the prefix, which the spans "real" leave out.

    Raises:
        InputError: `padding` is neither True nor False.
    """
    mask = causal | same_span("action")
    return mask & key_in("real") if true_or_false("padding", padding) else mask


def ranges(attention_mask: torch.Tensor, actions: int) -> dict[str, BatchSpans]:
    """The ranges of `expert_layers(padding=True)`.

    Args:
        attention_mask: `(batch, prefix)` of the prefix, of any dtype, 0 or False is padding. Reads the tensor on the
            host, see `spans.runs_of`.
        actions: tokens of the actions; the state is one token before them.

    Returns:
        "real" and "action", each per sequence a list of half-open `(start, end)` in positions of `[prefix | state |
        actions]`. `expert_layers()` takes the second alone.

    Raises:
        InputError: `attention_mask` is no tensor of two dimensions, or `actions` is no positive number of tokens.
    """
    actions = whole_number("actions", actions, "a positive number of tokens", least=1)
    if not isinstance(attention_mask, torch.Tensor):
        raise InputError("attention_mask", "a tensor (batch, prefix)", type(attention_mask).__name__)
    if attention_mask.ndim != 2:
        raise InputError("attention_mask", "shape (batch, prefix)", tuple(attention_mask.shape))
    whole = torch.nn.functional.pad(attention_mask != 0, (0, actions + 1), value=True)
    first = whole.shape[1] - actions
    return {"real": runs_of(whole, {1}), "action": [[(first, first + actions)]] * len(whole)}
