"""Integers that a caller gives: numpy arrays and tensors of any integer dtype on the host, as int32 where they fit.

And the other plain values: real numbers, True or False.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch

from fa4_prefixlm.errors import InputError

_WIDER = (torch.int64, torch.int16, torch.int8, torch.uint8)
_LARGEST = torch.iinfo(torch.int32).max


def as_int32(argument: str, values: Any) -> Any:
    """Tensors on the host and numpy arrays as int32 tensors; anything else, such as a list, as it is.

    Raises:
        InputError: a dtype that is no integer, a value that does not fit, or another dtype than int32 on a device,
            where looking at the values would wait for it.
    """
    if not isinstance(values, torch.Tensor):
        if not hasattr(values, "__array_interface__") and not hasattr(values, "__array__"):
            return values
        try:
            values = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(argument, "integers", f"{type(values).__name__}: {error}") from None
    if values.dtype == torch.int32:
        return values
    if values.device.type != "cpu" or values.dtype not in _WIDER:
        expected = "dtype torch.int32" if values.device.type != "cpu" else "dtype torch.int32 or torch.int64"
        raise InputError(argument, expected, values.dtype)
    if values.numel() and (int(values.max()) > _LARGEST or int(values.min()) < -_LARGEST - 1):
        raise InputError(argument, "values that fit int32", int(values.abs().max()))
    return values.to(torch.int32)


def whole_number(argument: str, value: Any, expected: str, *, least: int = 0) -> int:
    """A Python integer, of whatever integer was given: numpy's, or a tensor of one element on the host."""
    try:
        if isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.device.type != "cpu"):
            raise TypeError
        number = operator.index(value)
    except (TypeError, RuntimeError):
        raise InputError(argument, expected, f"{value!r} ({type(value).__name__})") from None
    if number < least:
        raise InputError(argument, expected, number)
    return number


def whole_numbers(argument: str, values: Any, expected: str) -> list[int]:
    """Python integers of at least 0, of a list, an array or a tensor on the host; `expected` says what each is."""
    unordered = isinstance(values, (str, bytes, Mapping, Set))
    if unordered or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise InputError(argument, "a list of integers", f"{values!r} ({type(values).__name__})")
    return [whole_number(f"{argument}[{index}]", own, expected) for index, own in enumerate(values)]


def true_or_false(argument: str, value: Any) -> bool:
    """The value, which must be one of the two."""
    if not isinstance(value, bool):
        raise InputError(argument, "True or False", repr(value))
    return value


def finite_number(argument: str, value: Any, expected: str) -> float:
    """A Python float, of whatever real number was given."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value):
        raise InputError(argument, expected, f"{value!r} ({type(value).__name__})")
    return float(value)
