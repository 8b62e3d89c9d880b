"""vLLM's own FlashAttention as version 4, for the steps of FA4_PREFIXLM in which every row is causal.

On Hopper vLLM takes version 3 up to head dim 256. A decoding step on version 4 has less work for the GPU
(docs/vllm.md#time). vLLM compiles most of its kernels where a request first needs them; on Hopper all are ready here
before the server takes requests, and kept on disk with this library's own.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none, set_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from fa4_prefixlm.fa4.kernels import disk_cache
from fa4_prefixlm.integrations.vllm import refusals

logger = init_logger("vllm.fa4_prefixlm")

# For each kind of layer FA4 compiles kernels of their own for more requests than this (`BIN_BATCH_SEARCH_THRESH`), for
# query rows (tokens by query heads of a key head) that fit one tile and for more, and for keys that are split over the
# GPU. What adds the splits up is compiled for up to 16 (head dims up to 64), 32, 64 and 128 of them.
MANY_REQUESTS = 256
A_TILE_AND_MORE = 512
SPLITS = (2, 17, 33, 65)


class FlashAttention4Impl(FlashAttentionImpl):
    """A layer of vLLM's, as version 4 unless the user chose another."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        with version_4(get_current_vllm_config_or_none()):
            super().__init__(*arguments, **named)
        self._build = refusals.fa4() if self.vllm_flash_attn_version == 4 else None

    def forward(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """vLLM's, with kernels from the disk."""
        with disk_cache.own_kernels(self._build) if self._build is not None else contextlib.nullcontext():
            return super().forward(*arguments, **named)


class FlashAttention4Builder(FlashAttentionMetadataBuilder):
    """vLLM's, for the version of the layers and causal steps: nothing is read of images."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        # vLLM asks for the current configuration's version. Its own warm-up would fill a cache of its own.
        with (
            set_current_vllm_config(vllm_config),
            version_4(vllm_config),
            _holding(vllm_config.kernel_config, "enable_jit_warmup", False),
        ):
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # With ranges version 4 runs a mask_mod on every key tile. Rows of an image that come here are causal all the
        # same: the only one of their request in this step, or the image's last.
        self.mm_prefix_query_ranges_np = None
        if device.type == "cuda":
            layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
            warm_up(layers, kv_cache_spec, vllm_config.scheduler_config.max_num_seqs, device)


class FlashAttention4Backend(FlashAttentionBackend):
    """vLLM's, with these two."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttention4Impl]:
        return FlashAttention4Impl

    @staticmethod
    def get_builder_cls() -> type[FlashAttention4Builder]:
        return FlashAttention4Builder


@contextlib.contextmanager
def version_4(vllm_config: VllmConfig | None) -> Iterator[None]:
    """Within the block vLLM's FlashAttention is made as version 4, unless the user chose one or this vLLM has none."""
    attention = None if vllm_config is None else vllm_config.attention_config
    if attention is None or attention.flash_attn_version is not None or not fa_utils.is_fa_version_supported(4):
        yield
        return
    with _holding(attention, "flash_attn_version", 4):
        yield


@contextlib.contextmanager
def _holding(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def warm_up(layers: list[Any], kv_cache_spec: Any, max_requests: int, device: torch.device) -> None:
    """Compile what causal steps of a group run on Hopper, or find it on disk, with a line in vLLM's log for each kind.

    On Blackwell, where nothing of this has run, some kernels are still compiled by the first requests.

    Args:
        layers: vLLM's, of one group.
        kv_cache_spec: of the group.
        max_requests: vLLM's `max_num_seqs`.
        device: of the layers.
    """
    kinds: dict[Any, tuple[Any, FlashAttention4Impl]] = {}
    for layer in layers:
        own = next(own for own in layer.impl.get_impl_variants() if isinstance(own, FlashAttention4Impl))
        kinds.setdefault((own.sliding_window, own.logits_soft_cap, own.sinks is None), (layer, own))
    for layer, own in kinds.values():
        if own.vllm_flash_attn_version != 4:  # the user's choice, or there is no version 4 of this kind
            continue
        began, before = time.monotonic(), Counter(disk_cache.counts)
        for requests, query_len, splits in _variants(max_requests):
            _run(layer, own, kv_cache_spec, requests, query_len, splits, device)
        new = Counter(disk_cache.counts) - before
        window = own.sliding_window[0] + 1
        logger.info(
            "FA4_PREFIXLM: ready: text and decoding%s, vLLM's FlashAttention 4 (%.1f s; %d kernels compiled, %d found)",
            f", window {window}" if window > 0 else "",
            time.monotonic() - began,
            new["compiled"],
            new["loaded"],
        )


def _variants(max_requests: int) -> list[tuple[int, int, int]]:
    """(requests, longest query, splits) of steps that need all that is compiled for a kind of layer."""
    batches = [1] + ([MANY_REQUESTS + 1] if max_requests > MANY_REQUESTS else [])
    whole = [(requests, query_len, 1) for requests in batches for query_len in (1, A_TILE_AND_MORE)]
    return whole + [(1, 1, splits) for splits in SPLITS]


def _run(
    layer: Any,
    own: FlashAttention4Impl,
    kv_cache_spec: Any,
    requests: int,
    query_len: int,
    splits: int,
    device: torch.device,
) -> None:
    """A step of one token a request, of zeros. query_len: what is said to be the longest."""
    size, heads, head_dim = kv_cache_spec.block_size, kv_cache_spec.num_kv_heads, kv_cache_spec.head_size
    cache = torch.zeros((1, heads, size, 2 * head_dim), dtype=kv_cache_spec.dtype, device=device)
    query = torch.zeros((requests, own.num_heads, head_dim), dtype=kv_cache_spec.dtype, device=device)
    new = torch.zeros((requests, heads, head_dim), dtype=kv_cache_spec.dtype, device=device)
    ones = torch.ones(requests, dtype=torch.int32, device=device)
    step = FlashAttentionMetadata(
        num_actual_tokens=requests,
        max_query_len=query_len,
        query_start_loc=torch.arange(requests + 1, dtype=torch.int32, device=device),
        max_seq_len=size,
        seq_lens=ones,
        block_table=torch.zeros((requests, 1), dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(requests, dtype=torch.int64, device=device),
        max_num_splits=splits,
    )
    own.forward(layer, query, new, new, cache, step, torch.empty_like(query))
