"""The authoring API, and the masks of known models, one family a file. Installed as `fa4_prefixlm.masks`.

from fa4_prefixlm.masks import causal, same_span, window, gemma3

mine = (causal | same_span("image")) & window(1024)
theirs = gemma3.local_layers(window=1024, like="transformers")
"""

from fa4_prefixlm.algebra import causal, key_in, one_block, prefix, query_in, same_span, window
from fa4_prefixlm.custom import from_cute
from fa4_prefixlm.flex import from_flex

from . import bagel, gemma3, gemma4, molmo2, moondream3, paligemma, rswa, t5
from .catalogue import CATALOGUE
from .packing import in_documents
from .prefix_lm import PrefixLM
from .spans import drop_longer, runs_of

__all__ = [
    "CATALOGUE",
    "PrefixLM",
    "bagel",
    "causal",
    "drop_longer",
    "from_cute",
    "from_flex",
    "gemma3",
    "gemma4",
    "in_documents",
    "key_in",
    "molmo2",
    "moondream3",
    "one_block",
    "paligemma",
    "prefix",
    "query_in",
    "rswa",
    "runs_of",
    "same_span",
    "t5",
    "window",
]
