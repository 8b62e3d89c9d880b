"""What a report says of the machine and the software that it was made with. No paths, no host names."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import torch

PACKAGES = (
    *("fa4_prefixlm", "torch", "triton", "flash-attn-4", "vllm"),
    *("nvidia-cutlass-dsl", "quack-kernels", "apache-tvm-ffi"),
)
DRIVER = pathlib.Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name and its architecture ("sm_90")."""

    name: str
    arch: str

    def __str__(self) -> str:
        return f"{self.name} ({self.arch})"


@dataclass(frozen=True)
class Machine:
    """A machine and its software.

    Attributes:
        python: Version.
        cuda: The CUDA that torch was built for; None for a CPU build.
        driver: Version of NVIDIA's driver; None where there is none, or where the system does not tell.
        gpus: Those that torch sees.
        versions: By package, of those of `PACKAGES` that are installed.
        commit: Of the checkout that fa4_prefixlm is imported from, "-dirty" where it has changes; None elsewhere.
    """

    python: str
    cuda: str | None
    driver: str | None
    gpus: tuple[Gpu, ...]
    versions: Mapping[str, str]
    commit: str | None

    @property
    def gpu(self) -> str:
        """The first GPU, or "no GPU"."""
        return str(self.gpus[0]) if self.gpus else "no GPU"

    def facts(self) -> dict[str, str]:
        """All of it by name, for a table or for JSON."""
        facts = {
            "python": self.python,
            "CUDA of torch": self.cuda or "none",
            "driver": self.driver or "",
            "GPUs": ", ".join(map(str, self.gpus)) or "none",
            **self.versions,
            "commit": self.commit or "",
        }
        return {name: fact for name, fact in facts.items() if fact}


def describe_machine() -> Machine:
    """The machine that it is called on, as torch sees it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    return Machine(
        python=platform.python_version(),
        cuda=torch.version.cuda,
        driver=_driver(),
        gpus=tuple(Gpu(own.name, f"sm_{own.major}{own.minor}") for own in devices),
        versions=versions(),
        commit=commit(),
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


def commit() -> str | None:
    """The commit of this checkout; a copy of a tree without its history gets it from the environment, as COMMIT."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed: a repository further up would be somebody else's
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return described.stdout.strip() or None


def _driver() -> str | None:
    try:
        found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else None
