"""Triton kernels, launched without Triton's look at every argument.

Triton finds the compiled form of a launch from its arguments, one by one, which for forty of them takes 50 us of the
host's time. A kernel of `Launcher` has forms that follow from a few things that are known: see there.
"""

# Triton's functions are not typed.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from triton.compiler import CompiledKernel

INT32 = torch.iinfo(torch.int32)
ALIGNED = 16


class Launcher:
    """A kernel that takes pointers, then integers, then constants, of which it specialises no integer.

    Then its compiled form follows from the constants, the device, the dtypes, whether each pointer is a multiple of 16
    bytes and whether each integer fits int32. Launches in which all are and do find their form here; others, and the
    first of a form, are Triton's own, as are all in its interpreter.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._forms: dict[tuple[object, ...], Any] = {}

    def __call__(
        self, programs: int, pointers: Sequence[torch.Tensor], integers: Sequence[int], constants: Mapping[str, object]
    ) -> None:
        """Launch `programs` programs on the current device and stream.

        Args:
            pointers, integers: in the order of the kernel's arguments.
            constants: by name, in the same order.
        """
        address = 0
        for own in pointers:
            address |= own.data_ptr()
        if address % ALIGNED or max(integers) > INT32.max or min(integers) < INT32.min:
            self._kernel[(programs,)](*pointers, *integers, **constants)
            return
        form = (pointers[0].device, *(own.dtype for own in pointers), *constants.values())
        compiled = self._forms.get(form)
        if compiled is not None:
            compiled[(programs, 1, 1)](*pointers, *integers, *constants.values())
            return
        compiled = self._kernel[(programs,)](*pointers, *integers, **constants)
        if isinstance(compiled, CompiledKernel):
            self._forms[form] = compiled
