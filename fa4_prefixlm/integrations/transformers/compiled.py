"""Attention under row bounds as one operation of a graph that `torch.compile` made.

The bounds are data of the graph, so the plan is made when it runs: by the first layer that has them, for all that have
the same. A graph reuses memory, and copies, behind everybody's back, so neither a tensor's address nor its layer says
which mask it is: the values do. A plan is made from a copy of them, and looking at them waits for the device.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.tensors import describe
from fa4_prefixlm.integrations.transformers import masks
from fa4_prefixlm.integrations.transformers.layer_attention import Call, dense, no_kernel, plan_of
from fa4_prefixlm.integrations.transformers.masks import Record, warn_once
from fa4_prefixlm.runtime.execute import run


@dataclass(frozen=True)
class _Kept:
    """A mask of a forward. bounds: a copy, for the graph may write something else where it had them."""

    bounds: torch.Tensor
    record: Record
    keys: int


_running = threading.local()
_KINDS = 8  # of masks in one forward, at most; more are right, and planned again


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    scaling: float | None,
    softcap: float,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    kept = _kept(bounds, k.shape[1])
    record = kept.record
    assert record.seen is not None
    end = max(1, record.seen.end)
    spec = describe(q, k[:, :end], v[:, :end])
    made = plan_of(record, kept.bounds.squeeze(1), spec)
    if isinstance(made, str):
        warn_once(no_kernel(made))
        return _sdpa(q, k, v, record.as_dense(), scaling, softcap, sink)
    k, v = k[:, :end], v[:, :end]
    return run(made, q, k, v, spec=spec, softmax_scale=scaling, softcap=softcap, learnable_sink=sink)[0]


def _kept(bounds: torch.Tensor, keys: int) -> _Kept:
    """What is known of these bounds, the mask that was used last first."""
    masks_of_forward: list[_Kept] = _running.__dict__.setdefault("masks", [])
    for at, own in enumerate(masks_of_forward):
        same = own.keys == keys and own.bounds.device == bounds.device and own.bounds.shape == bounds.shape
        if same and torch.equal(own.bounds, bounds):
            masks_of_forward.insert(0, masks_of_forward.pop(at))
            return own
    copy = bounds.detach().clone()
    record = masks.record_of(copy, keys)
    masks.read_back([record])
    masks_of_forward.insert(0, _Kept(copy, record, keys))
    del masks_of_forward[_KINDS:]
    return masks_of_forward[0]


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    module = torch.nn.Module()
    module.num_key_value_groups = q.shape[2] // k.shape[2]  # type: ignore[assignment]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return dense(Call(module, q, k, v, scaling, softcap, sink, None, {}), mask)[0]


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


_TAGS = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _TAGS.append(torch.Tag.cudagraph_unsafe)
_NAME = "fa4_prefixlm::bounded_attention"
torch.library.define(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor bounds, float? scaling, float softcap, Tensor? sink) -> Tensor",
    tags=_TAGS,
)
torch.library.impl(_NAME, "CompositeExplicitAutograd", _attention)
torch.library.register_fake(_NAME, _fake)
