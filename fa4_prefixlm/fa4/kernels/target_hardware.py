"""Compiling for a GPU that this machine does not have."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def target_hardware(module: str) -> Iterator[None]:
    """FA4's persistent schedulers (SM100) ask the CUDA driver for the number of SMs: answer for the target instead."""
    import cutlass.utils

    tile_scheduler = importlib.import_module(f"{module}.tile_scheduler")

    class TargetHardware:
        def get_device_multiprocessor_count(self) -> int:
            return int(os.environ["FLASH_ATTENTION_NUM_SMS"])

    name = "HardwareInfo"
    with (
        mock.patch.object(cutlass.utils, name, TargetHardware),
        mock.patch.object(tile_scheduler, name, TargetHardware),
    ):
        yield
