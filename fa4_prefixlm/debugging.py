"""The debug switch: check the values of device tensors too, at the cost of a synchronisation.

Off by default. `FA4_PREFIXLM_DEBUG=1` in the environment or `with fa4_prefixlm.debug():` turns it on.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

_enabled = contextvars.ContextVar("fa4_prefixlm_debug", default=os.environ.get("FA4_PREFIXLM_DEBUG", "0") == "1")


def enabled() -> bool:
    return _enabled.get()


@contextlib.contextmanager
def debug(on: bool = True) -> Iterator[None]:
    """Within the block, values of device tensors (`cu_seqlens_*`, `ranges`) are read back and checked on the host."""
    token = _enabled.set(on)
    try:
        yield
    finally:
        _enabled.reset(token)
