"""Block diffusion language models, in training: `block_diffusion(block)` over `[noised | clean]`, on all layers.

A sequence of `n` tokens is given twice, noised and clean, 2 n tokens in all, both at positions 0 to n - 1 for rotary
embeddings. Block `i` of the noised half sees itself and the clean blocks before `i`; the clean half is causal by
blocks. A row sees at most two intervals. In generation, and in what the cache has, a model is causal by blocks:
`causal | same_span("frame")` with the blocks as spans, see `video`.

Ranges: `noised_and_clean(lengths)`. The block is `block_size` in BD3-LM's configuration.

Source: Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models" (arXiv
2503.09573), and `block_diff_mask` in `models/dit.py` of its code, read: a block-diagonal part, an offset
block-causal part from noised to clean and a block-causal part among the clean. transformers 5.24.0 does not have the
model.
"""

from __future__ import annotations

from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.noised_copy import block_diffusion, noised_and_clean

__all__ = ["all_layers", "noised_and_clean"]


def all_layers(block: int) -> Mask:
    """All layers, in training.

    Args:
        block: tokens of a block.

    Raises:
        InputError: `block` is no positive number of tokens.
    """
    return block_diffusion(block)
