"""Defects of FA4 builds, and their cures.

SM90 list stride. `FlashAttentionForwardSm90.kernel` makes its `SeqlenInfoQK` without the tile sizes, so varlen block
lists are read with a row stride of ceil(seqlen_k / 128) whatever the key tile. With a key tile of 64, 80 or 112 (head
dims above 128) the output is silently wrong, relative error about 0.9. Seen in 4.0.0b36; found in a build by
`build.describe` (`sm90_list_stride == "128"`); without the cure tests fail in `tests/test_gpu.py` (the output) and in
`tests/test_crosscompile.py` (the tile that the kernel is traced with).
The cure is a subclass that completes the `SeqlenInfoCls` it is handed. It is right for every call of the kernel, so it
does no harm to whoever else compiles while it is in place.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

_enabled = True
_lock = threading.Lock()
_inside = 0


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """For tests only: launch as the build would by itself. Kernels that are compiled already stay as they are."""
    global _enabled
    _enabled, before = False, _enabled
    try:
        yield
    finally:
        _enabled = before


@contextlib.contextmanager
def sm90_list_stride() -> Iterator[None]:
    """Within the block, SM90 kernels that FA4's interface compiles read varlen block lists with their own tile."""
    if not _enabled:
        yield
        return
    from flash_attn.cute import interface

    global _inside
    original, cured = _kernel_classes()
    with _lock:
        _inside += 1
        interface.FlashAttentionForwardSm90 = cured
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:  # another thread may still be compiling
                interface.FlashAttentionForwardSm90 = original


@functools.cache
def _kernel_classes() -> tuple[type, type]:
    from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90

    load = _with_tile_sizes(FlashAttentionForwardSm90.load)
    mma = _with_tile_sizes(FlashAttentionForwardSm90.mma)
    cured = type("FlashAttentionForwardSm90WithListStride", (FlashAttentionForwardSm90,), {"load": load, "mma": mma})
    return FlashAttentionForwardSm90, cured


def _with_tile_sizes(method: Callable[..., Any]) -> Callable[..., Any]:
    index = list(inspect.signature(method).parameters).index("SeqlenInfoCls")

    def completed(self: Any, *arguments: Any) -> Any:
        before, seqlen_info, after = arguments[: index - 1], arguments[index - 1], arguments[index:]
        seqlen_info = functools.partial(seqlen_info, tile_m=self.tile_m, tile_n=self.tile_n)
        return method(self, *before, seqlen_info, *after)

    return completed
