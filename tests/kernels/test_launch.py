"""Which launches find their compiled form and which are Triton's, with a kernel that only notes what it gets."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from triton.compiler import CompiledKernel

from fa4_prefixlm.kernels import row_update
from fa4_prefixlm.kernels.launch import Launcher
from fa4_prefixlm.masks import causal
from fa4_prefixlm.masks.closed_form import closed_form

CONSTANTS: dict[str, object] = {"TILE": 64, "CHECKED": True}


class Noted(CompiledKernel):
    """A compiled form without a kernel."""

    def __init__(self, launches: list[Any]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launches.append((grid, *arguments))

    def __del__(self) -> None:
        pass


class Kernel:
    def __init__(self) -> None:
        self.by_triton: list[Any] = []
        self.by_form: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Noted:
            self.by_triton.append((grid, *arguments, constants))
            return Noted(self.by_form)

        return launch


def pointers(*offsets: int, dtype: torch.dtype = torch.int32) -> list[torch.Tensor]:
    """Tensors that begin so many elements past a multiple of 16 bytes."""
    return [torch.zeros(64, dtype=dtype)[offset:] for offset in offsets]


def test_the_second_launch_of_a_form_gets_the_arguments_in_order() -> None:
    kernel = Kernel()
    launch, own = Launcher(kernel), pointers(0, 4)
    launch(5, own, (1, 2), CONSTANTS)
    launch(7, own, (3, -4), CONSTANTS)
    assert kernel.by_triton == [((5,), *own, 1, 2, CONSTANTS)]
    assert kernel.by_form == [((7, 1, 1), *own, 3, -4, 64, True)]


@pytest.mark.parametrize(
    "other",
    [
        (pointers(0, 0, dtype=torch.int64), (1, 2), CONSTANTS),
        (pointers(0, 1), (1, 2), CONSTANTS),
        (pointers(0, 0), (1, 2**31), CONSTANTS),
        (pointers(0, 0), (-(2**31) - 1, 2), CONSTANTS),
        (pointers(0, 0), (1, 2), {**CONSTANTS, "CHECKED": False}),
    ],
    ids=["dtype", "alignment", "large", "small", "constant"],
)
def test_another_form_is_for_triton_to_find(other: Any) -> None:
    kernel = Kernel()
    launch = Launcher(kernel)
    launch(5, pointers(0, 0), (1, 2), CONSTANTS)
    launch(5, *other)
    assert len(kernel.by_triton) == 2
    assert not kernel.by_form


def test_an_interpreted_kernel_has_no_form() -> None:
    kernel = Kernel()
    launch = Launcher(
        type("Interpreted", (), {"__getitem__": lambda _, grid: lambda *_, **__: kernel[grid]() and None})()
    )
    for _ in range(3):
        launch(5, pointers(0), (1,), CONSTANTS)
    assert len(kernel.by_triton) == 3


@pytest.mark.parametrize("name", ["plan_rows_kernel", "update_rows_kernel"])
def test_kernels_take_pointers_then_integers_then_constants(name: str) -> None:
    """None of the integers is specialised, and the constants come last and in the order of the launch."""
    kernel = getattr(row_update, name)
    form = closed_form(causal)
    assert form is not None
    constants = list(row_update.constants(form, 64, 64))
    names = list(inspect.signature(kernel.fn).parameters)
    first = {"plan_rows_kernel": ["PADDING", "CHECKED", "CUMULATIVE"], "update_rows_kernel": []}[name]
    last = {"plan_rows_kernel": [], "update_rows_kernel": ["PAGES_AT_ONCE"]}[name]
    assert names[-len([*first, *constants, *last]) :] == [*first, *constants, *last]
    integers = names[6 if first else 10 : -len([*first, *constants, *last])]
    assert set(integers) <= set(row_update.BATCH_VALUES)
