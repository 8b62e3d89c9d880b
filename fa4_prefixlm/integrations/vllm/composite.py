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
    reach behind the window of its own last token. It can't where that window is the model's: vLLM drops spans that are
    longer (`compute_mm_prefix_ranges`). So a single query is always causal, and graphs of decoding are right.
    """

    def __init__(self, layer_names: list[str], vllm_config: VllmConfig) -> None:
        super().__init__(layer_names, vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        self.unclamped_window = _spans_pass_windows([layers[name] for name in layer_names], vllm_config)

    @staticmethod
    def get_cudagraph_support(vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Decoding, one token a request; nothing where a single query may see more than a causal row."""
        layers = list(vllm_config.compilation_config.static_forward_context.values())
        if _spans_pass_windows(layers, vllm_config):
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def _spans_pass_windows(layers: list[Any], vllm_config: VllmConfig) -> bool:
    """A span can be longer than the window of a layer that does not clamp it: one narrower than the model's."""
    longest = vllm_config.model_config.get_sliding_window()
    unclamped = [
        getattr(layer, "sliding_window", None)
        for layer in layers
        if not getattr(layer, "mm_prefix_clamp_sliding_window", False)
    ]
    return any(window is not None and (longest is None or window < longest) for window in unclamped)


RoutedPrefixLMBackend = create_composite_attention_backend(
    PrefixLMBackend,
    FlashAttention4Backend,
    name="RoutedPrefixLMBackend",
    backend_name="FA4_PREFIXLM",
    module=__name__,
    routing_policy=PrefixLMRouting,
)
