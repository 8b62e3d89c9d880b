"""Workarounds for defects of FA4 builds.

SM90 list stride. `FlashAttentionForwardSm90.kernel` makes its `SeqlenInfoQK` without the tile sizes, so varlen block
lists are read with a row stride of ceil(seqlen_k / 128) whatever the key tile. With a key tile of 64, 80 or 112 (head
dims above 128) the output is silently wrong, relative error about 0.9. Seen in 4.0.0b36; found in a build by
`build.describe` (`sm90_list_stride == "128"`). Without the workaround tests fail in `tests/fa4/kernels/`:
`test_gpu_workarounds.py` (the output) and `test_workarounds.py` (the tile that the kernel is traced with).
The workaround is a subclass that adds the tile sizes to the `SeqlenInfoCls` it is given. It is right for every call of
the kernel, so it does no harm if another thread compiles while it is in place.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

_enabled = True
_lock = threading.Lock()
_inside: Counter[str] = Counter()


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """For tests only: launch without workarounds."""
    global _enabled
    _enabled, before = False, _enabled
    try:
        yield
    finally:
        _enabled = before


@contextlib.contextmanager
def sm90_list_stride(module: str) -> Iterator[str]:
    """While it is entered, SM90 kernels that the build compiles read varlen block lists with their own tile.

    Yields the workaround's name, "" if it is disabled: kernels that are compiled with it are others than those without.
    """
    if not _enabled:
        yield ""
        return
    interface = importlib.import_module(f"{module}.interface")
    original, patched = _kernel_classes(module)
    with _lock:
        _inside[module] += 1
        interface.FlashAttentionForwardSm90 = patched  # type: ignore[attr-defined]
    try:
        yield "with sm90_list_stride"
    finally:
        with _lock:
            _inside[module] -= 1
            if _inside[module] == 0:  # another thread may still be compiling
                interface.FlashAttentionForwardSm90 = original  # type: ignore[attr-defined]


@functools.cache
def _kernel_classes(module: str) -> tuple[type, type]:
    original = importlib.import_module(f"{module}.flash_fwd_sm90").FlashAttentionForwardSm90
    load, mma = _with_tile_sizes(original.load), _with_tile_sizes(original.mma)
    return original, type("FlashAttentionForwardSm90WithListStride", (original,), {"load": load, "mma": mma})


def _with_tile_sizes(method: Callable[..., Any]) -> Callable[..., Any]:
    index = list(inspect.signature(method).parameters).index("SeqlenInfoCls")

    def completed(self: Any, *arguments: Any, **named: Any) -> Any:
        before, seqlen_info, after = arguments[: index - 1], arguments[index - 1], arguments[index:]
        seqlen_info = functools.partial(seqlen_info, tile_m=self.tile_m, tile_n=self.tile_n)
        return method(self, *before, seqlen_info, *after, **named)

    return completed
