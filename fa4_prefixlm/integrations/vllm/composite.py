"""The attention backend FA4_PREFIXLM: images here, text and decoding on vLLM's own FlashAttention 4.

vLLM composes two backends over one cache and chooses between them for every step. Its calls of FlashAttention split the
keys of a long context over the GPU where few queries read them; this library's do not.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.composite import MMPrefixAttentionRouting, create_composite_attention_backend

from fa4_prefixlm.integrations.vllm.backend import PrefixLMBackend
from fa4_prefixlm.integrations.vllm.text_and_decoding import FlashAttention4Backend


class PrefixLMRouting(MMPrefixAttentionRouting):
    """Steps in which a query token sees more than a causal row go to this library.

    vLLM's own routing takes the general backend wherever a layer does not clamp spans to its window, since a span could
    reach behind the window of its own last token. It can't: vLLM drops spans that are longer than the window there
    (`compute_mm_prefix_ranges`). So a single query is always causal, and graphs of decoding are right.
    """

    def __init__(self, layer_names: list[str], vllm_config: VllmConfig) -> None:
        super().__init__(layer_names, vllm_config)
        self.unclamped_window = False

    @staticmethod
    def get_cudagraph_support(vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Decoding, one token a request."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


RoutedPrefixLMBackend = create_composite_attention_backend(
    PrefixLMBackend,
    FlashAttention4Backend,
    name="RoutedPrefixLMBackend",
    backend_name="FA4_PREFIXLM",
    module=__name__,
    routing_policy=PrefixLMRouting,
)
