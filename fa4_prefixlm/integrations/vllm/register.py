"""The entry point `fa4_prefixlm` of the group `vllm.general_plugins`: vLLM calls `register` in every process.

It names the backends and imports nothing of FlashAttention-4, nor their classes: vLLM imports those when one is asked
for. Whatever is wrong here is logged, and vLLM starts without.
"""

from __future__ import annotations

import copyreg
import importlib.metadata
import logging
import re
from typing import Any

SUPPORTED = "0.33"
BACKENDS = {
    # Batches with an image in them on this library, the others on vLLM's own FlashAttention.
    "FA4_PREFIXLM": "fa4_prefixlm.integrations.vllm.composite.RoutedPrefixLMBackend",
    # All batches on this library.
    "FA4_PREFIXLM_ALL": "fa4_prefixlm.integrations.vllm.backend.PrefixLMBackend",
}

# Below "vllm", so that it is printed as vLLM's own lines are.
logger = logging.getLogger("vllm.fa4_prefixlm")


def unsupported(version: str | None = None) -> str | None:
    """Why the backends are not registered with a vLLM; None if they are.

    Args:
        version: of vLLM; None: of the one that is installed.
    """
    if version is None:
        try:
            version = importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            return "vLLM is not installed"
    if re.match(rf"{re.escape(SUPPORTED)}\b", version) is None:
        return f"this is vLLM {version}, and the backends were made for {SUPPORTED}"
    return None


def register() -> None:
    """Make the backends known to this process. May be called more than once."""
    try:
        reason = unsupported()
        if reason is not None:
            logger.warning("%s are not registered: %s", " and ".join(BACKENDS), reason)
            return
        _register()
    except Exception:
        logger.exception("%s are not registered", " and ".join(BACKENDS))


def _register() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, path in BACKENDS.items():
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, path)
    copyreg.pickle(AttentionBackendEnum, _reduce)


def _reduce(member: Any) -> tuple[Any, ...]:
    """How a member is pickled.

    A configuration crosses into processes that vLLM spawns before plugins are loaded there, and a member that is not
    registered has no value to be found by. So ours register themselves where they are unpickled.
    """
    return (_member, (member.name,)) if member.name in BACKENDS else (type(member), (member.value,))


def _member(name: str) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    _register()
    return AttentionBackendEnum[name]
