"""vLLM's Python on a CPU without its extensions: the environment of the process, and three operations in torch."""

from __future__ import annotations

import os

import torch

# The variable that holds the path of the backend's class, for the processes of the engine.
BACKEND = "FA4_PREFIXLM_TESTS_CPU_BACKEND"

_library: torch.library.Library | None = None


def environment(runner: str) -> dict[str, str]:
    """What the process has to be started with. runner: "V1" or "V2", vLLM's model runner."""
    own = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0",
    }
    # The second runner's kernels are Triton's. With no device to see, vLLM takes Triton to be there without a driver.
    return own | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if runner == "V2" else {})


def prepare() -> None:
    """Define the operations, and have vLLM's CPU platform take `BACKEND`: it takes CPU_ATTN whatever is asked for."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, os.environ[BACKEND])
    _define()


def _define() -> None:
    global _library
    if _library is not None or hasattr(torch.ops._C, "init_cpu_memory_env"):
        return
    _library = torch.library.Library("_C", "FRAGMENT")
    _library.define("init_cpu_memory_env(int[] nodes) -> ()")
    _library.define(
        "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table,"
        " Tensor(a!) slot_mapping, int block_size) -> ()"
    )
    _library.define("greedy_argmax(Tensor logits) -> Tensor")
    _library.impl("init_cpu_memory_env", lambda nodes: None, "CompositeExplicitAutograd")
    _library.impl("compute_slot_mapping_kernel_impl", _slot_mapping, "CPU")
    _library.impl("greedy_argmax", lambda logits: logits.argmax(dim=-1).view(-1), "CPU")


def _slot_mapping(
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
) -> None:
    total = int(query_start_loc[-1])
    request = torch.repeat_interleave(torch.arange(len(query_start_loc) - 1), query_start_loc.diff().long())
    positions = positions[:total].long()
    blocks = block_table[request, positions // block_size].long()
    slot_mapping[:total] = blocks * block_size + positions % block_size
    slot_mapping[total:] = -1
