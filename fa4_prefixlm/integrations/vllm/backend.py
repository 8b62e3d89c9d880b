"""The attention backend FA4_PREFIXLM_ALL: text, decoding and batches with images all run on this library.

File and line of what it answers to in vLLM 0.33.0: docs/vllm_internals.md.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends import fa_utils

from fa4_prefixlm.errors import UnsupportedError
from fa4_prefixlm.fa4.kernels import disk_cache
from fa4_prefixlm.integrations.vllm import refusals
from fa4_prefixlm.integrations.vllm.plans import GroupPlans, MMRanges, Placed, find_build, layer_mask, place
from fa4_prefixlm.masks.base import Mask

logger = init_logger("vllm.fa4_prefixlm")

# What ran in this process, by name, for whoever wants to know that it did: "steps", "steps with images", "calls".
counts: Counter[str] = Counter()


class PrefixLMBackend(AttentionBackend):
    """What vLLM asks before it takes a backend. What is not declared here is not supported, vLLM's default."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's registry."""
        return "FA4_PREFIXLM_ALL"

    @staticmethod
    def get_impl_cls() -> type[PrefixLMImpl]:
        """One for each layer."""
        return PrefixLMImpl

    @staticmethod
    def get_builder_cls() -> type[PrefixLMBuilder]:
        """One for each group of layers that share a block table."""
        return PrefixLMBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Tokens of a block: FA4 loads 16 rows at a time."""
        return [MultipleOf(16)]

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Images are what it is for."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """With and without clamping spans to it."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """FA4 has them."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Spans are placed from the query lengths that the host knows."""
        return False

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """Why a configuration is not run, in words; None if it is."""
        config = get_current_vllm_config_or_none()
        reasons = [] if config is None else refusals.of_configuration(config)
        no_kernel = refusals.of_kernels(head_size, device_capability.to_int())
        return "; ".join(reasons + ([no_kernel] if no_kernel else [])) or None


@dataclasses.dataclass
class PrefixLMMetadata(AttentionMetadata):
    """A step, as layers get it. slot_mapping, num_actual_tokens: vLLM's, which reads them here."""

    plans: GroupPlans
    num_actual_tokens: int
    slot_mapping: torch.Tensor


class PrefixLMBuilder(AttentionMetadataBuilder[PrefixLMMetadata]):
    """Turns each step of vLLM into one update of a group's plans."""

    supports_update_block_table = False  # the plans hold one group's block table

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        refuse(vllm_config, kv_cache_spec)
        layers = {name: vllm_config.compilation_config.static_forward_context[name] for name in layer_names}
        self.plans = make_plans(layers, kv_cache_spec, vllm_config, device)
        self._exact_on_host = device.type == "cpu"
        _say_what_runs(self.plans, layers, kv_cache_spec, vllm_config)
        if device.type == "cuda":
            _warm_up(self.plans, layers)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """All batches, where FA4 reads the buffers that an update writes; else none."""
        if refusals.of_cache(kv_cache_spec) is not None:  # the builder raises, and says why
            return AttentionCGSupport.NEVER
        layers = {
            name: layer
            for name, layer in vllm_config.compilation_config.static_forward_context.items()
            if getattr(layer, "head_size", None) == kv_cache_spec.head_size
            and getattr(layer, "num_kv_heads", None) == kv_cache_spec.num_kv_heads
        }
        device = torch.device(vllm_config.device_config.device_type)
        plans = make_plans(layers, kv_cache_spec, vllm_config, device, smallest=True)
        return AttentionCGSupport.ALWAYS if plans.in_place else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PrefixLMMetadata:
        """Take a step: one copy of what is on the host, one launch, no synchronisation."""
        cm = common_attn_metadata
        if cm.causal is not True:
            raise UnsupportedError("causal", "True for all requests: this backend runs decoders", cm.causal)
        seq_lens_cpu = cm.seq_lens_cpu_upper_bound
        if seq_lens_cpu is None:
            raise UnsupportedError("seq_lens_cpu_upper_bound", "the lengths that vLLM's runners know on the host", None)
        self.plans.take(
            _placed(cm.query_start_loc_cpu, seq_lens_cpu, cm.mm_req_doc_ranges, cm.num_reqs),
            query_start_loc=cm.query_start_loc,
            seq_lens=cm.seq_lens,
            block_table=cm.block_table_tensor,
            exact_on_host=self._exact_on_host,
        )
        counts["steps"] += 1
        counts["steps with images"] += not self.plans.text_only
        return PrefixLMMetadata(self.plans, cm.num_actual_tokens, cm.slot_mapping)


def _placed(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, mm_ranges: MMRanges | None, requests: int) -> Placed:
    """The step placed on the host: once, for vLLM hands the same objects to the builders of all groups.

    A step's dictionary of ranges is made for it alone. Without one there is nothing to place.
    """
    given = (mm_ranges, query_start_loc, seq_lens)
    last, placed = _last_step
    if mm_ranges is None or placed is None or any(own is not kept for own, kept in zip(given, last, strict=True)):
        lengths = {"query_start_loc": query_start_loc[: requests + 1], "seq_lens": seq_lens[:requests]}
        placed = place(**lengths, mm_ranges=mm_ranges)
        _last_step[:] = given, placed
    return placed


_last_step: list[Any] = [(None, None, None), None]


class PrefixLMImpl(AttentionImpl[PrefixLMMetadata]):
    """A layer."""

    can_return_lse_for_decode = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise UnsupportedError("alibi_slopes", "none: FA4 has no ALiBi", f"{len(alibi_slopes)} slopes")
        if attn_type != AttentionType.DECODER:
            raise UnsupportedError("attn_type", "decoder attention over a cache", str(attn_type))
        if kv_cache_dtype not in PrefixLMBackend.supported_kv_cache_dtypes:
            expected = f"one of {', '.join(PrefixLMBackend.supported_kv_cache_dtypes)}"
            raise UnsupportedError("kv_cache_dtype", expected, kv_cache_dtype)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window, self.kv_cache_dtype = sliding_window, kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.softcap, self.sinks = logits_soft_cap or 0.0, sinks

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write this step's keys and values; a layer that shares another's cache is not asked to.

        Args:
            layer: vLLM's.
            key, value: `(rows, kv_heads, head_dim)`, with at least the step's tokens.
            kv_cache: `(blocks, kv_heads, block_size, 2 * head_dim)`, of any strides.
            slot_mapping: `(tokens,)` int64, block and row of each token as one number, -1 for none.
        """
        if kv_cache.is_cuda:
            keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            scales = (layer._k_scale, layer._v_scale)
            fa_utils.reshape_and_cache_flash(key, value, keys, values, slot_mapping, self.kv_cache_dtype, *scales)
            return
        held = slot_mapping >= 0
        rows, tokens = slot_mapping[held], len(slot_mapping)
        both = torch.cat([key[:tokens][held], value[:tokens][held]], dim=-1)
        size = kv_cache.shape[2]
        kv_cache.transpose(1, 2)[rows // size, rows % size] = both

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PrefixLMMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the layer's attention to `output`; without metadata, when vLLM measures its memory, zeros."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("output_scale", "none: the output is not quantized here", "one")
        if attn_metadata is None:
            return output.fill_(0)
        counts["calls"] += 1
        return attn_metadata.plans.attention(
            layer.layer_name,
            query,
            kv_cache,
            output,
            softmax_scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
        )


def refuse(vllm_config: VllmConfig, kv_cache_spec: Any) -> None:
    """Raise `UnsupportedError` at start-up for what is not run, also where vLLM's platform does not ask."""
    reasons = refusals.of_configuration(vllm_config)
    of_cache = refusals.of_cache(kv_cache_spec)
    if reasons or of_cache:
        got = "; ".join([*reasons, *([of_cache] if of_cache else [])])
        raise UnsupportedError("attention_backend", "a configuration that FA4_PREFIXLM runs", got)


def masks_of(layers: dict[str, Any], vllm_config: VllmConfig) -> dict[str, Mask]:
    """The mask of each layer by its name. A layer's own window counts, not its group's, which can hold both kinds."""
    model = vllm_config.model_config
    # vLLM's Gemma 4 takes the ranges away from these layers by names that its own backends use.
    causal_global = getattr(model.hf_text_config, "use_bidirectional_attention", None) == "vision"
    return {
        name: layer_mask(
            layer.sliding_window,
            clamp=layer.mm_prefix_clamp_sliding_window,
            prefix_lm=model.is_mm_prefix_lm and not (causal_global and layer.sliding_window is None),
        )
        for name, layer in layers.items()
    }


def make_plans(
    layers: dict[str, Any],
    kv_cache_spec: Any,
    vllm_config: VllmConfig,
    device: torch.device,
    *,
    smallest: bool = False,
) -> GroupPlans:
    """The plans of a group. smallest: for one token, to see which backends they take."""
    heads = {layer.num_heads for layer in layers.values()}
    if len(heads) != 1:
        raise UnsupportedError("num_heads", "one number of query heads in a group of layers", sorted(heads))
    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    rows = max(scheduler.max_num_batched_tokens, compilation.max_cudagraph_capture_size or 0)
    blocks = -(-vllm_config.model_config.max_model_len // kv_cache_spec.block_size)
    return GroupPlans(
        masks_of(layers, vllm_config),
        max_tokens=1 if smallest else rows,
        max_requests=1 if smallest else scheduler.max_num_seqs,
        max_blocks=1 if smallest else blocks,
        block_size=kv_cache_spec.block_size,
        num_heads=heads.pop(),
        num_kv_heads=kv_cache_spec.num_kv_heads,
        head_dim=kv_cache_spec.head_size,
        dtype=kv_cache_spec.dtype,
        device=device,
        build=find_build() if device.type == "cuda" else None,
    )


def _say_what_runs(plans: GroupPlans, layers: dict[str, Any], kv_cache_spec: Any, vllm_config: VllmConfig) -> None:
    """Once, at start-up, what runs where."""
    for mask, number in Counter(plans.plan_of(name).mask for name in layers).items():
        plan = plans.plans[mask]
        runs = f"`{plan.choice.name}`"
        if plan.spec.device.type == "cuda":
            build = refusals.fa4()
            runs += f" of {build.name}" if build is not None else ""
            runs += ", batches without images, where they come here, FA4's causal call" if mask.names else ""
        what = f"{number} layers of head dim {kv_cache_spec.head_size}, blocks of {kv_cache_spec.block_size}, {mask}"
        logger.info_once("FA4_PREFIXLM: %s: %s", what, runs)
    clamped = all(layer.mm_prefix_clamp_sliding_window for layer in layers.values() if layer.sliding_window)
    window = vllm_config.model_config.get_sliding_window()
    if vllm_config.model_config.is_mm_prefix_lm and window is not None and not clamped:
        logger.info_once("FA4_PREFIXLM: images of more than %d tokens run causally, as vLLM has it", window)


def _warm_up(plans: GroupPlans, layers: dict[str, Any]) -> None:
    """Compile all that the group can run, or find it on disk, with lines in vLLM's log."""
    before = Counter(disk_cache.counts)
    variants = next(iter(layers.values())).impl.get_impl_variants()
    impl = next(own for own in variants if isinstance(own, PrefixLMImpl))

    def progress(what: str, seconds: float) -> None:
        logger.info("FA4_PREFIXLM: ready: %s (%.1f s)", what, seconds)

    plans.warm_up(progress=progress, softcap=impl.softcap, sinks=impl.sinks)
    new = Counter(disk_cache.counts) - before
    logger.info("FA4_PREFIXLM: %d kernels compiled, %d found on disk", new["compiled"], new["loaded"])
