"""ModernBERT, an encoder: every third layer is global, the others see a window on both sides.

`layer_types` says which layer is which (else every `global_attn_every_n_layers`-th is global).

- "full_attention": `everything`.
- "sliding_attention": `window(n // 2 + 1, n // 2)`, `n` is `local_attention` of the configuration, 128: the window from
  end to end. So a token sees 64 tokens on each side and itself. transformers' own name for the half, 64, is
  `sliding_window`.

There are no spans. Padding: sequences of their own (`cu_seqlens`), or `packing.in_documents`.

Source: `ModernBertModel.forward` and `ModernBertConfig.sliding_window` in `models/modernbert` of transformers 5.24.0
(tests/masks/models/test_transformers_5_24.py runs it).
"""

from __future__ import annotations

from fa4_prefixlm.batch.integers import whole_number
from fa4_prefixlm.masks.atoms import everything, window
from fa4_prefixlm.masks.base import Mask


def global_layers() -> Mask:
    """Layers of type "full_attention"."""
    return everything


def local_layers(local_attention: int) -> Mask:
    """Layers of type "sliding_attention".

    Args:
        local_attention: the configuration's number, in tokens: the window from end to end, 128.

    Raises:
        InputError: `local_attention` is no positive number of tokens.
    """
    half = whole_number("local_attention", local_attention, "a positive number of tokens", least=1) // 2
    return window(half + 1, half)
