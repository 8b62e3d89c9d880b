"""`attention` inside `torch.compile`: custom ops that find their plan by a number.

Dynamo compiles a graph for the values of every attribute it reads, but never for the values of a tensor. So a traced
call reads one attribute of its plan, `handle`, a 0-d int64 tensor on the CPU, and the next batch's plan fits the graph
that is there. The op reads the number, without synchronising the GPU, and makes the eager call with the plan behind it.
All checks are those of the eager call, and raise the same errors when the graph runs.

The ops, in namespace `fa4_prefixlm`: `attention`, and its backward, `attention_backward`; `attention_out`, which writes
`out`; `refuse`, which raises when the graph runs what the trace found wrong (an error raised in a trace would reach the
user as one of dynamo's). The backward finds its plan by the same number, so a plan has to live until it has run.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fa4_prefixlm.batch.forward_pass import ForwardPass
from fa4_prefixlm.errors import InputError, UnsupportedError
from fa4_prefixlm.runtime import autograd
from fa4_prefixlm.runtime.execute import NO_GRADIENT_OUT, Pair, Runnable, run, run_backward

PART_OF_THE_PLAN = "None beside a plan, which has its own from fp.plan() or fp.serving_plan()"
NEEDS_PLAN = "a plan, made with fp.plan(ranges, like=(q, k, v), ...) outside of the code that torch.compile compiles"

_plans: weakref.WeakValueDictionary[int, Runnable] = weakref.WeakValueDictionary()
# A random start: a handle that was pickled or exported finds no plan in another process, rather than a wrong one.
_numbers = itertools.count(secrets.randbits(62))


def register(plan: Runnable) -> torch.Tensor:
    """The new handle of `plan`, which the registry does not keep alive."""
    number = next(_numbers)
    _plans[number] = plan
    if not torch.is_inference_mode_enabled():
        return torch.tensor(number, dtype=torch.int64, device="cpu")
    with torch.inference_mode(False):  # a tensor made in inference mode fails the guards of one that was not
        return torch.tensor(number, dtype=torch.int64, device="cpu")


def _plan(handle: torch.Tensor) -> Runnable:
    plan = _plans.get(int(handle))
    if plan is None:
        raise InputError(
            "ranges", "a plan that is kept until the compiled call, and its backward, have run", "one that is gone"
        )
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
    deterministic: bool | None = None,
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
    needs_grad = autograd.is_needed(q, k, v, learnable_sink)
    call = (q, k, v, plan.handle, softmax_scale, softcap, learnable_sink)
    if out is None:
        return ops.attention(*call, needs_grad, deterministic)
    if needs_grad:
        return refuse("out", NO_GRADIENT_OUT, "a tensor")
    return out, ops.attention_out(*call, out)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    softmax_scale: float | None,
    softcap: float,
    learnable_sink: torch.Tensor | None,
    needs_grad: bool = False,
    deterministic: bool | None = None,
    *,
    out: torch.Tensor | None = None,
) -> Pair:
    return run(
        _plan(handle),
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        softcap=softcap,
        learnable_sink=learnable_sink,
        out=out,
        deterministic=deterministic,
        needs_grad=needs_grad,
    )


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> Pair:
    """Tensors of the shapes, dtypes and strides that `attention` returns."""
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if q.ndim != 4:
        return out, q.new_empty((q.shape[-2], q.shape[0]), dtype=torch.float32)
    batch, rows, heads = q.shape[:3]
    return out, q.new_empty_strided((batch, heads, rows), (rows, batch * rows, 1), dtype=torch.float32)


def _attention_out(*call: Any) -> torch.Tensor:
    *before, out = call
    return _attention(*before, out=out)[1]


def _attention_out_fake(*call: Any) -> torch.Tensor:
    return _attention_fake(*call)[1]


def _attention_backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    handle: torch.Tensor,
    softmax_scale: float | None,
    softcap: float,
    learnable_sink: torch.Tensor | None,
    of_sink: bool,
    deterministic: bool | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv, dsink = run_backward(
        _plan(handle),
        dout,
        dlse,
        ForwardPass(q, k, v, out, lse),
        softmax_scale=softmax_scale,
        softcap=softcap,
        learnable_sink=learnable_sink,
        deterministic=deterministic,
        of_sink=of_sink,
    )
    # As the fake says: a backend may keep the strides of what it got.
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), q.new_empty(0) if dsink is None else dsink


def _attention_backward_fake(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    handle: torch.Tensor,
    softmax_scale: float | None,
    softcap: float,
    learnable_sink: torch.Tensor | None,
    of_sink: bool,
    deterministic: bool | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dsink = torch.empty_like(learnable_sink) if of_sink and learnable_sink is not None else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, k, v, handle, ctx.softmax_scale, ctx.softcap, sink, _, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, handle, sink, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    q, k, v, handle, sink, out, lse = ctx.saved_tensors
    of_sink = ctx.needs_input_grad[6]
    options = (ctx.softmax_scale, ctx.softcap, sink, of_sink, ctx.deterministic)
    dq, dk, dv, dsink = torch.ops.fa4_prefixlm.attention_backward(dout, dlse, q, k, v, out, lse, handle, *options)
    return dq, dk, dv, None, None, None, dsink if of_sink else None, None, None


def _no_second_derivative(ctx: Any, *_: torch.Tensor) -> None:
    autograd.refuse_second_derivative()


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
_define(
    "attention",
    f"({_CALL}, bool needs_grad=False, bool? deterministic=None) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)
_define(
    "attention_backward",
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor handle, "
    "float? softmax_scale, float softcap, Tensor? learnable_sink, bool of_sink, bool? deterministic) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    _attention_backward_fake,
)
torch.library.register_autograd("fa4_prefixlm::attention", _gradients, setup_context=_save)
torch.library.register_autograd("fa4_prefixlm::attention_backward", _no_second_derivative)
_define("attention_out", f"({_CALL}, Tensor(a!) out) -> Tensor", _attention_out, _attention_out_fake)
_define(
    "refuse",  # it says that it writes `out`, to stay in a graph that uses nothing else of the call
    "(Tensor q, Tensor v, Tensor(a!)? out, str argument, str expected, str got, bool unsupported) -> (Tensor, Tensor)",
    _refuse,
    _refuse_fake,
)
