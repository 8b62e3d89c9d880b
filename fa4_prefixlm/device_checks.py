"""Values on the device: the debug switch, assertions that do not synchronise, copies that do not wait; what is there.

Debug mode checks the values of device tensors on the host too, at the cost of a synchronisation. It is off by default;
`FA4_PREFIXLM_DEBUG=1` in the environment or `with fa4_prefixlm.debug():` turns it on.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

_enabled = contextvars.ContextVar("fa4_prefixlm_debug", default=os.environ.get("FA4_PREFIXLM_DEBUG", "0") == "1")


def enabled() -> bool:
    """Debug mode is on."""
    return _enabled.get()


@contextlib.contextmanager
def debug(on: bool = True) -> Iterator[None]:
    """Within the block, values of device tensors (`cu_seqlens_*`, `ranges`) are read back and checked on the host.

    Args:
        on: False turns debug mode off within the block.
    """
    token = _enabled.set(on)
    try:
        yield
    finally:
        _enabled.reset(token)


def host_knows(values: object) -> bool:
    """The values can be looked at without waiting for a device, or debug mode looks at them all the same."""
    return not isinstance(values, torch.Tensor) or values.device.type == "cpu" or enabled()


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Fail, without synchronising, unless the 0-d bool tensor is True: a device-side assertion on a GPU."""
    torch._assert_async(condition, message)


def is_fake(tensor: torch.Tensor) -> bool:
    """The tensor has no values: a kernel is being compiled for a device that is not here."""
    return isinstance(tensor, FakeTensor)


@functools.cache
def has_triton() -> bool:
    """Triton is installed, which compiles kernels for a GPU."""
    return importlib.util.find_spec("triton") is not None


def is_capturing() -> bool:
    """The current stream records a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def to_device(values: object, device: torch.device) -> torch.Tensor:
    """An int32 tensor on `device`, copied without waiting for the device."""
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.int32, device="cpu")
    if device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
        # A pinned tensor may be written again by its owner before the copy has run.
        tensor = tensor.clone() if tensor.is_pinned() else tensor
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_device_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """int32 tensors of the host on `device`, in one copy that does not wait for the device.

    They share memory of their own, and each begins at a multiple of 16 bytes there.
    """
    if device.type == "cpu":
        return list(tensors)
    begins, end = [], 0
    for tensor in tensors:
        begins.append(end)
        end += -(-tensor.numel() // 4) * 4
    here = torch.empty(end, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda" and _has_cuda())
    for begin, tensor in zip(begins, tensors, strict=True):
        here.narrow(0, begin, tensor.numel()).copy_(tensor.reshape(-1))
    there = here.to(device, non_blocking=True)
    return [
        there.narrow(0, begin, tensor.numel()).view(tensor.shape) for begin, tensor in zip(begins, tensors, strict=True)
    ]


def integers_to_device(lists: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """Lists of integers as int32 tensors on `device`, in one copy that does not wait for the device.

    They share memory of their own, and each begins at a multiple of 16 bytes there.
    """
    flat: list[int] = []
    begins: list[int] = []
    for values in lists:
        begins.append(len(flat))
        flat += values
        flat += (0,) * (-len(values) % 4)
    pinned = device.type == "cuda" and _has_cuda()
    there = torch.tensor(flat, dtype=torch.int32, device="cpu", pin_memory=pinned).to(device, non_blocking=True)
    return [there.narrow(0, begin, len(values)) for begin, values in zip(begins, lists, strict=True)]


@functools.cache
def _has_cuda() -> bool:
    return torch.cuda.is_available()
