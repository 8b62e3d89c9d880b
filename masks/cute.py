"""A mask with its own kernel code: a CuTe mask_mod, the tensors it reads, and an eager twin of the same mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.flex import EvaluatedMask
from fa4_prefixlm.masks.protocols import CustomKernel, MaskMod


@dataclass(frozen=True)
class CuteMask(EvaluatedMask):
    """A mask that brings its own kernel code.

    Attributes:
        kernel: its mask_mod, and the tensors that it reads.
    """

    kernel: CustomKernel

    @property
    def custom_kernel(self) -> CustomKernel:
        return self.kernel


def from_cute(mask_mod: Callable[..., Any], *, aux_tensors: Sequence[torch.Tensor] = (), twin: MaskMod) -> Mask:
    """A mask that runs your own CuTe mask_mod in the varlen backend; block lists come from its eager twin.

    Args:
        mask_mod: a module-level (or cached) `@cute.jit` function `(batch_idx, head_idx, q_idx, kv_idx, seqlen_info,
            aux_tensors)` of one-element TensorSSA indices that returns a boolean TensorSSA. `q_idx` and `kv_idx` are
            local to the sequence; the absolute position of the query is `q_idx + seqlen_k - seqlen_q`, its row in the
            packed queries `q_idx + seqlen_info.offset_q`. It is also called for rows and keys past the end of a
            sequence, up to a tile.
        aux_tensors: a list of the CUDA tensors it reads, on the device of `q`, of the shapes and dtypes that it takes;
            padded by 256 entries where it indexes them by row or by key. A flag per packed key is int32
            `(total_k + 256,)`.
        twin: the same mask as a FlexAttention mask_mod of absolute positions `(b, h, q_idx, kv_idx)`. The reference
            backend runs it, and every block list is derived from it, so where the two disagree the output is wrong:
            compare `attention(..., backend="varlen")` with `backend="reference"` in a test of yours. A plan holds the
            twin's runs of keys, so its memory grows with the tokens times the most runs that a row has.

    Returns:
        A mask that stands alone: combining it by `&` or `|` is an `InputError`.

    Raises:
        InputError: here if `mask_mod` or `twin` is no function, or `aux_tensors` no list of tensors; when a plan is
            made if the twin is not one that `from_flex` takes.
    """
    for name, function in (("mask_mod", mask_mod), ("twin", twin)):
        if not callable(function):
            raise InputError(name, "a function", type(function).__name__)
    if not isinstance(aux_tensors, Sequence) or not all(isinstance(own, torch.Tensor) for own in aux_tensors):
        raise InputError("aux_tensors", "a list of tensors", f"{aux_tensors!r} ({type(aux_tensors).__name__})")
    return CuteMask(twin, None, CustomKernel(mask_mod, tuple(aux_tensors)))
