"""`attention` inside `torch.compile`: custom ops that find their plan by a number.

Dynamo compiles a graph for the values of every attribute it reads, but never for the values of a tensor. So a traced
call reads one attribute of its plan, `handle`, a 0-d int64 tensor on the CPU, and the next batch's plan fits the graph
that is there. The op reads the number, without synchronising the GPU, and makes the eager call with the plan behind it.
All checks are those of the eager call, and raise the same errors when the graph runs.

The ops, in namespace `fa4_prefixlm`: `attention`; `attention_out`, which writes `out`; `refuse`, which raises when the
graph runs what the trace found wrong (an error raised in a trace would reach the user as one of dynamo's).
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fa4_prefixlm.errors import InputError, UnsupportedError
from fa4_prefixlm.runtime.execute import Pair, Runnable, run

PART_OF_THE_PLAN = "None beside a plan, which has its own from fp.plan() or fp.serving_plan()"
NEEDS_PLAN = "a plan, made with fp.plan(ranges, like=(q, k, v), ...) outside of the code that torch.compile compiles"
NO_GRADIENT = "no gradient in torch.compile (torch.no_grad(), or attention in a function under torch.compiler.disable)"

_plans: weakref.WeakValueDictionary[int, Runnable] = weakref.WeakValueDictionary()
# A random start: a handle that was pickled or exported finds no plan in another process, rather than a wrong one.
_numbers = itertools.count(secrets.randbits(62))


def register(plan: Runnable) -> torch.Tensor:
    """The new handle of `plan`, which the registry does not keep alive."""
    number = next(_numbers)
    _plans[number] = plan
    with torch.inference_mode(False):  # a tensor made in inference mode fails the guards of one that was not
        return torch.tensor(number, dtype=torch.int64, device="cpu")


def _plan(handle: torch.Tensor) -> Runnable:
    plan = _plans.get(int(handle))
    if plan is None:
        raise InputError("ranges", "a plan that is kept until the compiled call has run", "one that is gone")
    return plan


def in_graph(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Runnable | None,
    parts: Mapping[str, object],
    softmax_scale: float | None,
    softcap: float,
    learnable_sink: torch.Tensor | None,
    out: torch.Tensor | None,
) -> Pair:
    """What dynamo traces of `attention`: `(out, lse)`.

    plan: None if the call has spans instead. parts: by name, the arguments that go into a plan and not beside one.
    """
    ops = torch.ops.fa4_prefixlm

    def refuse(argument: str, expected: str, got: str, unsupported: bool = False) -> Pair:
        return ops.refuse(q.detach(), v.detach(), out, argument, expected, got, unsupported)

    if plan is None:
        return refuse("ranges", NEEDS_PLAN, "spans or None")
    for name, value in parts.items():
        if value is not None:
            return refuse(name, PART_OF_THE_PLAN, "a value")
    if torch.is_grad_enabled():
        if q.requires_grad or k.requires_grad or v.requires_grad:
            return refuse("q, k, v", NO_GRADIENT, "requires_grad", True)
        if learnable_sink is not None and learnable_sink.requires_grad:
            return refuse("learnable_sink", NO_GRADIENT, "requires_grad", True)
    call = (q, k, v, plan.handle, softmax_scale, softcap, learnable_sink)
    return ops.attention(*call) if out is None else (out, ops.attention_out(*call, out))


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    softmax_scale: float | None,
    softcap: float,
    learnable_sink: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> Pair:
    return run(
        _plan(handle), q, k, v, softmax_scale=softmax_scale, softcap=softcap, learnable_sink=learnable_sink, out=out
    )


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> Pair:
    """Tensors of the shapes, dtypes and strides that `attention` returns."""
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if q.ndim != 4:
        return out, q.new_empty((q.shape[-2], q.shape[0]), dtype=torch.float32)
    batch, rows, heads = q.shape[:3]
    return out, q.new_empty_strided((batch, heads, rows), (rows, batch * rows, 1), dtype=torch.float32)


def _attention_out(*call: Any) -> torch.Tensor:
    return _attention(*call)[1]


def _attention_out_fake(*call: Any) -> torch.Tensor:
    return _attention_fake(*call)[1]


def _refuse(
    q: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    argument: str,
    expected: str,
    got: str,
    unsupported: bool,
) -> Pair:
    raise (UnsupportedError if unsupported else InputError)(argument, expected, got)


def _refuse_fake(q: torch.Tensor, v: torch.Tensor, *_: object) -> Pair:
    return _attention_fake(q, v, v)


def _refuse_transform(*_: object) -> None:
    raise UnsupportedError("q, k, v", "no torch.func transform (grad, vmap, ...) in torch.compile", "one")


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """As torch.library.custom_op, whose calls take 10 us longer."""
    name = f"fa4_prefixlm::{name}"
    tags = [torch.Tag.pt2_compliant_tag]
    if hasattr(torch.Tag, "cudagraph_unsafe"):
        tags.append(torch.Tag.cudagraph_unsafe)  # a CUDA graph of inductor's would replay the plan it captured
    torch.library.define(name, schema, tags=tags)
    torch.library.impl(name, "CompositeExplicitAutograd", run)
    torch.library.impl(name, "FuncTorchDynamicLayerFrontMode", _refuse_transform)  # or torch.func.grad finds zeros
    torch.library.register_fake(name, fake)


_CALL = "Tensor q, Tensor k, Tensor v, Tensor handle, float? softmax_scale, float softcap, Tensor? learnable_sink"
_define("attention", f"({_CALL}) -> (Tensor, Tensor)", _attention, _attention_fake)
_define("attention_out", f"({_CALL}, Tensor(a!) out) -> Tensor", _attention_out, _attention_out_fake)
_define(
    "refuse",  # it says that it writes `out`, to stay in a graph that uses nothing else of the call
    "(Tensor q, Tensor v, Tensor(a!)? out, str argument, str expected, str got, bool unsupported) -> (Tensor, Tensor)",
    _refuse,
    _refuse_fake,
)
