"""Integers that a caller gives: numpy arrays and tensors of any integer dtype on the host, as int32 where they fit."""

from __future__ import annotations

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
