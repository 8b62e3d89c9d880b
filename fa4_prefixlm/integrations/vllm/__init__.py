"""vLLM 0.33 on this library: `vllm serve MODEL --attention-backend FA4_PREFIXLM`. See docs/vllm.md.

`plans` turns the metadata of a step into plans and imports nothing of vLLM. `refusals` says what is not run. `backend`
has vLLM's three classes, `composite` the form that leaves text to vLLM's own FlashAttention, and `register` is the
entry point by which vLLM finds them.
"""

from fa4_prefixlm.integrations.vllm.plans import (
    VENDORED,
    GroupPlans,
    find_build,
    layer_mask,
    place,
    spans_from_mm_ranges,
    split_cache,
)

__all__ = ["VENDORED", "GroupPlans", "find_build", "layer_mask", "place", "spans_from_mm_ranges", "split_cache"]
