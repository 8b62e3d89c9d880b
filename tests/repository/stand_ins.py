"""Stand-ins of what the sketch in docs/vllm.md takes from vLLM: no more than the names and attributes it uses."""

from __future__ import annotations

import dataclasses
import types

import torch

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 2, 16, 16


class Builder:
    def __init__(self, kv_cache_spec: object, layer_names: list[str], vllm_config: types.SimpleNamespace, device: str):
        self.model_config, self.block_size = vllm_config.model_config, BLOCK_SIZE
        self.num_heads_q, self.num_heads_kv, self.headdim = HEADS, KV_HEADS, HEAD_DIM
        self.kv_cache_dtype = torch.float32

    def build(self, common_prefix_len: int, common: object, fast_build: bool = False) -> types.SimpleNamespace:
        return types.SimpleNamespace()


class Impl:
    scale, logits_soft_cap, sinks = HEAD_DIM**-0.5, 0.0, None

    def forward(self, *arguments: object, **scales: object) -> str:
        return "vLLM's own"


def names() -> dict[str, object]:
    return {
        "FlashAttentionMetadataBuilder": Builder,
        "FlashAttentionImpl": Impl,
        "FlashAttentionBackend": object,
        "AttentionCGSupport": types.SimpleNamespace(UNIFORM_SINGLE_TOKEN_DECODE="one token"),
        "AttentionBackendEnum": types.SimpleNamespace(CUSTOM="custom"),
        "register_backend": lambda backend, path: None,
    }


def config(model_type: str, is_mm_prefix_lm: bool = True) -> types.SimpleNamespace:
    """Two layers, local and global."""
    layers = {
        name: types.SimpleNamespace(sliding_window=window, mm_prefix_clamp_sliding_window=False)
        for name, window in (("local", 32), ("global", None))
    }
    model = types.SimpleNamespace(
        is_mm_prefix_lm=is_mm_prefix_lm,
        hf_text_config=types.SimpleNamespace(model_type=model_type),
        max_model_len=64,
    )
    return types.SimpleNamespace(
        model_config=model,
        scheduler_config=types.SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=2),
        compilation_config=types.SimpleNamespace(static_forward_context=layers),
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """common: vLLM's metadata of a step of one request with 40 tokens. contiguous: its keys and values."""

    common: types.SimpleNamespace
    cache: torch.Tensor
    contiguous: tuple[torch.Tensor, torch.Tensor]


def step(ranges: dict[int, list[tuple[int, int]]] | None) -> Step:
    starts, used = torch.tensor([0, 40], dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    both = torch.randn(3 * BLOCK_SIZE, KV_HEADS, 2 * HEAD_DIM, generator=torch.Generator().manual_seed(0))
    common = types.SimpleNamespace(
        mm_req_doc_ranges=ranges,
        causal=True,
        query_start_loc=starts,
        seq_lens=used,
        block_table_tensor=torch.tensor([[2, 0, 1, 0]], dtype=torch.int32),
        query_start_loc_cpu=starts,
        seq_lens_cpu_upper_bound=used,
    )
    cache = torch.empty(3, BLOCK_SIZE, KV_HEADS, 2 * HEAD_DIM)
    cache[torch.tensor([2, 0, 1])] = both.unflatten(0, (3, BLOCK_SIZE))
    k, v = both[:40].split(HEAD_DIM, dim=2)
    return Step(common, cache.transpose(1, 2), (k, v))
