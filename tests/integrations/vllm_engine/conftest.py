"""These tests run in vLLM's environment (`make test-vllm`), on its CPU platform; elsewhere they are skipped."""

from __future__ import annotations

import importlib.util
import os
import pathlib

import pytest
import torch

FOLDER = pathlib.Path(__file__).parent


def _why_not() -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed: make test-vllm has an environment for it"
    if torch.cuda.is_available():
        return "on a GPU benchmarks/vllm_engine.py is this test"
    return None


if _why_not() is None:
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # before vLLM looks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    for item in items:
        if reason is not None and FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
