"""What graphs that `torch.compile` made do with row bounds, as operations that run eager code.

The bounds are data of the graph, so the plan is made when it runs: by the first layer that has them, for all that have
the same. A graph reuses memory, and copies, behind everybody's back, so neither a tensor's address nor its layer says
which mask it is: the values do. A plan is made from a copy of them, and looking at them waits for the device. A mask
that eager code made, and that is alive, is found as in eager code: of several intervals it knows more than its values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fa4_prefixlm.integrations.transformers import masks
from fa4_prefixlm.integrations.transformers.layer_attention import Call, under
from fa4_prefixlm.integrations.transformers.masks import Record


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
    module = torch.nn.Module()
    module.num_key_value_groups = q.shape[2] // k.shape[2]  # type: ignore[assignment]
    query, key, value = (own.transpose(1, 2) for own in (q, k, v))
    call = Call(module, query, key, value, scaling, softcap, sink, None, {})
    record = masks.made_here(bounds, k.shape[1])
    if record is None:
        kept = _kept(bounds, k.shape[1])
        bounds, record = kept.bounds, kept.record
    return under(call, bounds, masks.waited_for(record), flex=False)[0]


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


def _dense_mask(bounds: torch.Tensor, keys: int) -> torch.Tensor:
    """The mask as SDPA has it, a copy, for a graph writes where it likes."""
    record = masks.made_here(bounds, keys)
    if record is None:
        return masks.alone(bounds, keys)
    record = masks.waited_for(record)
    assert record.seen is not None
    if record.seen.overflow:
        made = record.as_dense().expand(len(bounds), 1, bounds.shape[2], keys)
        return made.clone(memory_format=torch.contiguous_format)
    return masks.visible(record.in_several() if record.uses_several else bounds, keys)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _fake_mask(bounds: torch.Tensor, keys: int) -> torch.Tensor:
    return bounds.new_empty((bounds.shape[0], 1, bounds.shape[2], keys), dtype=torch.bool)


_TAGS = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _TAGS.append(torch.Tag.cudagraph_unsafe)
_OPERATIONS: tuple[tuple[str, str, Callable[..., torch.Tensor], Callable[..., torch.Tensor]], ...] = (
    (
        "bounded_attention",
        "(Tensor q, Tensor k, Tensor v, Tensor bounds, float? scaling, float softcap, Tensor? sink) -> Tensor",
        _attention,
        _fake,
    ),
    ("dense_mask", "(Tensor bounds, SymInt keys) -> Tensor", _dense_mask, _fake_mask),
)
for _name, _schema, _run, _shape in _OPERATIONS:
    torch.library.define(f"fa4_prefixlm::{_name}", _schema, tags=_TAGS)
    torch.library.impl(f"fa4_prefixlm::{_name}", "CompositeExplicitAutograd", _run)
    torch.library.register_fake(f"fa4_prefixlm::{_name}", _shape)
