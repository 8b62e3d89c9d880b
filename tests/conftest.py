"""GPU tests are collected everywhere and skipped, with a reason, where they can't run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest
import torch

from fa4_prefixlm.backends import cudnn
from fa4_prefixlm.fa4.builds import locate

# Tests compile, unless they say otherwise: what is on disk was compiled from other code, and by other tests.
os.environ.setdefault("FA4_PREFIXLM_CACHE", "0")
# The workers of pytest-xdist share the cores already, and so do the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU here"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"needs a Hopper GPU, this is sm_{torch.cuda.get_device_capability()[0]}x"
    if locate.installed() is None:
        return "flash-attn-4 is not installed"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_no_gpu()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", metavar="FILE", help="append what GPU tests measure to FILE, one JSON a line")


@pytest.fixture(autouse=True)
def _without_cudnn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen for GPUs that are not here does not depend on an optional package that may be."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(cudnn, "_not_installed", lambda: "nvidia-cudnn-frontend is not installed")


@pytest.fixture
def gpu_report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call it with measured values; they are kept if `--gpu-report` was given."""
    path = request.config.getoption("--gpu-report")

    def keep(**values: object) -> None:
        if path:
            with open(path, "a") as file:
                file.write(json.dumps({"test": request.node.name, **values}) + "\n")

    return keep
