"""EmbeddingGemma 1 and 2, encoders: global layers, and local ones that see a window on both sides.

`layer_types` says which layer is which. The two count `sliding_window` in two ways:

| | model type in transformers | `sliding_window` in config.json | "sliding_attention" |
| --- | --- | --- | --- |
| 1 | "gemma3_text", `use_bidirectional_attention` | the window from end to end, n | `window(n // 2 + 1, n // 2)` |
| 2 | "embedding_gemma2" | the radius, r | `window(r + 1, r)` |

"full_attention" is `everything`. Of the first, transformers replaces the number when the configuration is loaded: there
`config.sliding_window` is `n // 2 + 1`, and `to_dict` gives `n` back.

There are no spans: also in version 2 the tokens of an image or of audio are like others. Padding: sequences of their
own (`cu_seqlens`), or `packing.in_documents`.

Source: `Gemma3TextModel.forward` and `Gemma3TextConfig.__post_init__` in `models/gemma3`, `EmbeddingGemma2TextModel` in
`models/embedding_gemma2/modeling_embedding_gemma2.py` of transformers 5.24.0
(tests/masks/models/test_transformers_5_24.py runs both).
"""

from __future__ import annotations

from typing import Literal

from fa4_prefixlm.batch.integers import whole_number
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.atoms import everything, window
from fa4_prefixlm.masks.base import Mask


def global_layers() -> Mask:
    """Layers of type "full_attention"."""
    return everything


def local_layers(sliding_window: int, *, version: Literal[1, 2]) -> Mask:
    """Layers of type "sliding_attention".

    Args:
        sliding_window: the number in config.json, in tokens: of version 1 the window from end to end (512), of version
            2 the tokens on each side (512).
        version: 1 or 2.

    Raises:
        InputError: `sliding_window` is no positive number of tokens, or `version` is neither 1 nor 2.
    """
    if type(version) is not int or version not in (1, 2):
        raise InputError("version", "1 or 2", repr(version))
    tokens = whole_number("sliding_window", sliding_window, "a positive number of tokens", least=1)
    each_side = tokens // 2 if version == 1 else tokens
    return window(each_side + 1, each_side)
