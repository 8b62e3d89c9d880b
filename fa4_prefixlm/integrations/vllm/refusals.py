"""What of vLLM's configuration these backends do not run, said at start-up. Imports nothing of vLLM.

vLLM asks a backend for most of it by a declared capability (`backend`); this is what it has no question for.
"""

from __future__ import annotations

from typing import Any

from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.integrations.vllm.plans import find_build

# Layers' caches, by the name of their specification: `(blocks, kv_heads, block_size, 2 * head_dim)`, one row a token.
CACHES = ("FullAttentionSpec", "SlidingWindowSpec")


def of_configuration(config: Any) -> list[str]:
    """Why a configuration is not run, one sentence each.

    Args:
        config: a `VllmConfig`.
    """
    reasons = []
    if config.speculative_config is not None:
        reasons.append(
            "speculative decoding: a captured draft loop refreshes its metadata without asking the backend, and "
            "spans are placed from lengths that the host knows"
        )
    parallel = config.parallel_config
    for size, name in (
        (parallel.decode_context_parallel_size, "decode_context_parallel_size"),
        (parallel.prefill_context_parallel_size, "prefill_context_parallel_size"),
    ):
        if size > 1:
            reasons.append(f"{name} = {size}: a rank would hold a part of the keys, and place spans in the whole")
    if not config.model_config.is_mm_prefix_lm:
        return reasons
    if parallel.use_ubatching:
        reasons.append("micro-batching (enable_dbo, ubatch_size): vLLM drops the ranges of images on the way to it")
    if config.cache_config.kv_sharing_fast_prefill:
        reasons.append("kv_sharing_fast_prefill: the rows of a step are then not the last ones of their request")
    if config.scheduler_config.is_multimodal_model and not config.scheduler_config.disable_chunked_mm_input:
        reasons.append("disable_chunked_mm_input must be set: an image has to be prefilled in one step")
    return reasons


def of_cache(spec: Any) -> str | None:
    """Why the layers of a cache are not run; None if they are.

    Args:
        spec: a `KVCacheSpec`.
    """
    kind = type(spec).__name__
    if kind not in CACHES:
        return f"a cache of {kind}; only {' and '.join(CACHES)}"
    if getattr(spec, "attention_chunk_size", None) is not None:
        return "chunked local attention"
    if getattr(spec, "head_size_v", spec.head_size) != spec.head_size:
        return f"values of head dim {spec.head_size_v} beside keys of {spec.head_size}"
    return None


def of_kernels(head_dim: int, arch: int) -> str | None:
    """Why no FlashAttention-4 kernel runs a head dim; None if one does.

    Args:
        head_dim: of keys and values.
        arch: compute capability, 90 or 100.
    """
    build = fa4()
    if build is None:
        return "FlashAttention-4 is not installed, neither vLLM's own nor flash-attn-4"
    refusal = build.head_dims.refusal(arch, head_dim, head_dim)
    return None if refusal is None else f"head dim {head_dim} on {build.name}: {refusal}"


def fa4() -> Build | None:
    """The FA4 that the backends run on; None if there is none."""
    return locate.installed(find_build())
