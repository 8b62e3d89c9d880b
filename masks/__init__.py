"""The authoring API, and the masks of known models, one family a file. Installed as `fa4_prefixlm.masks`.

    from fa4_prefixlm.masks import causal, same_span, window, gemma3

    mine = (causal | same_span("image")) & window(1024)
    theirs = gemma3.local_layers(window=1024, like="transformers")

A mask is a value. Atoms and masks combine by `&` and `|`.
"""

from fa4_prefixlm.masks.atoms import (
    causal,
    everything,
    key_in,
    key_outside,
    one_block,
    prefix,
    query_in,
    same_span,
    window,
)
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.cute import from_cute
from fa4_prefixlm.masks.flex import from_flex
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO, END_OF_KEYS, Intervals
from fa4_prefixlm.masks.models import (
    bagel,
    bd3lm,
    diffusion_gemma,
    embedding_gemma,
    gemma3,
    gemma4,
    hrm_text,
    modernbert,
    molmo2,
    moondream3,
    paligemma,
    pi0,
    rswa,
    streaming,
    t5,
    t5gemma,
    video,
)
from fa4_prefixlm.masks.models.catalogue import CATALOGUE
from fa4_prefixlm.masks.noised_copy import block_diffusion, noised_and_clean
from fa4_prefixlm.masks.packing import in_documents
from fa4_prefixlm.masks.prefix_lm import PrefixLM
from fa4_prefixlm.masks.prefix_tree import prefix_trees, tree_mask
from fa4_prefixlm.masks.protocols import Ahead, Pairs, Reach, Rows
from fa4_prefixlm.masks.spans import drop_longer, runs_of, runs_on_device

__all__ = [
    "CATALOGUE",
    "Ahead",
    "EMPTY_HI",
    "EMPTY_LO",
    "END_OF_KEYS",
    "Intervals",
    "Mask",
    "Pairs",
    "PrefixLM",
    "Reach",
    "Rows",
    "bagel",
    "bd3lm",
    "block_diffusion",
    "causal",
    "noised_and_clean",
    "diffusion_gemma",
    "drop_longer",
    "embedding_gemma",
    "everything",
    "from_cute",
    "from_flex",
    "gemma3",
    "gemma4",
    "hrm_text",
    "in_documents",
    "key_in",
    "key_outside",
    "modernbert",
    "molmo2",
    "moondream3",
    "one_block",
    "paligemma",
    "pi0",
    "prefix",
    "prefix_trees",
    "query_in",
    "rswa",
    "runs_of",
    "runs_on_device",
    "same_span",
    "streaming",
    "t5",
    "t5gemma",
    "tree_mask",
    "video",
    "window",
]
