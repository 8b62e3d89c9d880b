"""The authoring API, and the masks of known models, one family a file. Installed as `fa4_prefixlm.masks`.

from fa4_prefixlm.masks import causal, same_span, window

mine = (causal | same_span("image")) & window(1024)
"""

from fa4_prefixlm.algebra import causal, key_in, one_block, prefix, query_in, same_span, window
from fa4_prefixlm.custom import from_cute
from fa4_prefixlm.flex import from_flex

from .prefix_lm import PrefixLM

__all__ = [
    "PrefixLM",
    "causal",
    "from_cute",
    "from_flex",
    "key_in",
    "one_block",
    "prefix",
    "query_in",
    "same_span",
    "window",
]
