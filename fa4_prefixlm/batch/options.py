"""The options of one call: scale, softcap and sinks, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.errors import InputError


@dataclass(frozen=True)
class Options:
    """What a call says beside its tensors and its mask.

    Attributes:
        softmax_scale: positive and finite.
        softcap: 0.0 is none.
        learnable_sink: `(heads,)` logits on the device, or None.
    """

    softmax_scale: float
    softcap: float = 0.0
    learnable_sink: torch.Tensor | None = None

    @classmethod
    def checked(
        cls, spec: CallSpec, softmax_scale: float | None, softcap: float, learnable_sink: torch.Tensor | None
    ) -> Options:
        """The options of a call on tensors like `spec`; a scale of None is `1 / sqrt(head_dim)`."""
        _check_sink(learnable_sink, spec)
        return cls(_scale(softmax_scale, spec), _softcap(softcap), learnable_sink)


def _check_sink(learnable_sink: torch.Tensor | None, spec: CallSpec) -> None:
    if learnable_sink is None:
        return
    if not isinstance(learnable_sink, torch.Tensor):
        raise InputError("learnable_sink", "a torch.Tensor", type(learnable_sink).__name__)
    if learnable_sink.shape != (spec.heads_q,):
        raise InputError("learnable_sink", f"shape ({spec.heads_q},), one per query head", tuple(learnable_sink.shape))
    wide = spec.dtype == learnable_sink.dtype == torch.float64  # the reference
    if not wide and learnable_sink.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError("learnable_sink", "dtype float32, bfloat16 or float16", learnable_sink.dtype)
    if learnable_sink.device != spec.device:
        raise InputError("learnable_sink", f"q's device {spec.device}", learnable_sink.device)


def _scale(softmax_scale: float | None, spec: CallSpec) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(spec.head_dim)
    # FA4 multiplies masked scores, which are -inf, with it: only a positive scale leaves them so.
    if not isinstance(softmax_scale, int | float) or not math.isfinite(softmax_scale) or softmax_scale <= 0:
        raise InputError("softmax_scale", "a positive finite number", softmax_scale)
    return float(softmax_scale)


def _softcap(softcap: float) -> float:
    if not isinstance(softcap, int | float) or not math.isfinite(softcap) or softcap < 0:
        raise InputError("softcap", "a non-negative finite number, 0.0 for none", softcap)
    return float(softcap)
