"""Attention under row bounds as one operation of a graph that `torch.compile` made.

The bounds are data of the graph, so the plan is made when it runs: by the first layer of a kind, for all of that kind.
A graph reuses memory behind everybody's back, so a tensor's address does not say that it is the same mask. Layers run
in order: a layer that does not come after the one that used the plan last begins another forward.
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


@dataclass
class _Forward:
    """The masks of a running forward. bounds is held, so that its memory is not given to another tensor."""

    bounds: torch.Tensor
    record: Record
    layer: int


_running = threading.local()
_KINDS = 8


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    scaling: float | None,
    softcap: float,
    sink: torch.Tensor | None,
    layer: int,
    kind: int,
) -> torch.Tensor:
    record = _record(bounds, k.shape[1], layer, kind)
    assert record.seen is not None
    end = max(1, record.seen.end)
    spec = describe(q, k[:, :end], v[:, :end])
    made = plan_of(record, bounds.squeeze(1), spec)
    if isinstance(made, str):
        warn_once(no_kernel(made))
        return _sdpa(q, k, v, record.as_dense(), scaling, softcap, sink)
    k, v = k[:, :end], v[:, :end]
    return run(made, q, k, v, spec=spec, softmax_scale=scaling, softcap=softcap, learnable_sink=sink)[0]


def _record(bounds: torch.Tensor, keys: int, layer: int, kind: int) -> Record:
    kept: dict[object, _Forward] = _running.__dict__.setdefault("forwards", {})
    name = (bounds.data_ptr(), bounds.shape, bounds.stride(), bounds.device, keys, kind)
    forward = kept.get(name)
    if forward is not None and layer > forward.layer:
        forward.layer = layer
        return forward.record
    kept.pop(name, None)
    while len(kept) >= _KINDS:
        kept.pop(next(iter(kept)))
    record = masks.record_of(bounds, keys)
    masks.read_back([record])
    kept[name] = _Forward(bounds.detach(), record, layer)
    return record


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
    "(Tensor q, Tensor k, Tensor v, Tensor bounds, float? scaling, float softcap, Tensor? sink, int layer, int kind)"
    " -> Tensor",
    tags=_TAGS,
)
torch.library.impl(_NAME, "CompositeExplicitAutograd", _attention)
torch.library.register_fake(_NAME, _fake)
