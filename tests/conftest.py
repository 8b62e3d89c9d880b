"""GPU tests are collected everywhere and skipped, with a reason, where they can't run."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from fa4_prefixlm.fa4.builds import locate


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


@pytest.fixture
def gpu_report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call it with measured values; they are kept if `--gpu-report` was given."""
    path = request.config.getoption("--gpu-report")

    def keep(**values: object) -> None:
        if path:
            with open(path, "a") as file:
                file.write(json.dumps({"test": request.node.name, **values}) + "\n")

    return keep
