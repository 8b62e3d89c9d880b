"""The packages that decide what an FA4 does here, by version: what every report says of its machine."""

from __future__ import annotations

import importlib.metadata

PACKAGES = (
    *("fa4_prefixlm", "torch", "triton", "flash-attn-4", "vllm"),
    *("nvidia-cutlass-dsl", "quack-kernels", "apache-tvm-ffi"),
)


def versions() -> dict[str, str]:
    """Versions by package, of those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
