"""Run a plan on tensors: the checks of a call, and the launch. Every way of calling `attention` ends here."""

from __future__ import annotations

from typing import Protocol

import torch

from fa4_prefixlm.backends.base import Gradients, Prepared
from fa4_prefixlm.backends.flex import Flex
from fa4_prefixlm.backends.reference import Reference
from fa4_prefixlm.backends.select import Choice
from fa4_prefixlm.batch.forward_pass import ForwardPass
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec, check_out, describe
from fa4_prefixlm.errors import InputError, UnsupportedError
from fa4_prefixlm.runtime import autograd

Pair = tuple[torch.Tensor, torch.Tensor]

NO_GRADIENT_OUT = "None where a gradient is needed: autograd keeps the output"


class Runnable(Protocol):
    """What `Plan` and `ServingPlan` have in common."""

    @property
    def spec(self) -> CallSpec:
        """What the tensors must look like."""

    @property
    def choice(self) -> Choice:
        """The backends, forward and backward."""

    @property
    def prepared(self) -> Prepared:
        """The backend's state."""

    @property
    def handle(self) -> torch.Tensor:
        """0-d int64 on the CPU: the number by which a compiled graph finds the plan, see `torch_ops`."""

    def check(self, spec: CallSpec) -> None:
        """Refuse tensors that the plan was not made for."""

    def gradients(self, deterministic: bool) -> Gradients:
        """The backward's state, made at the first call. Raises `UnsupportedError` where there is none."""


def run(
    plan: Runnable,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spec: CallSpec | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    learnable_sink: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    deterministic: bool | None = None,
    needs_grad: bool | None = None,
) -> Pair:
    """Check the call and run the plan: `(out, lse)`.

    Args:
        spec: what the tensors look like, where that is known and is what the plan was made for.
        needs_grad: a backward follows that autograd does not see here; None: autograd says.
    """
    if spec is None:
        spec = describe(q, k, v, cache=plan.spec.cache)
        plan.check(spec)
    check_out(out, spec)
    options = Options.checked(spec, softmax_scale, softcap, learnable_sink)
    wanted = autograd.is_needed(q, k, v, learnable_sink)
    deterministic = in_order(deterministic)
    if (wanted or needs_grad) and out is not None:
        raise InputError("out", NO_GRADIENT_OUT, "a tensor")
    gradients = None
    if needs_grad or (wanted and not _through_torch(plan)):
        # Before the forward: what has no backward is refused, and the kernel of the forward waits for no table of it.
        gradients = _gradients(plan, spec, deterministic)
    elif plan.choice.name == Flex.name:  # torch compiles nothing within a transform
        autograd.refuse_transforms()
    if spec.batched:
        q = q.flatten(0, 1)
        if spec.page_size is None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        out = out.flatten(0, 1) if out is not None else None
    if wanted and gradients is not None:
        call = autograd.Call(plan.prepared, gradients, options)
        result, lse = autograd.differentiable(q, k, v, call)
    else:
        result, lse = plan.prepared.run(q, k, v, options, out)
    if spec.batched:
        result = result.unflatten(0, spec.shape_q)
        lse = lse.unflatten(1, spec.shape_q).transpose(0, 1)
    return result, lse


def check_same(spec: CallSpec, wanted: CallSpec, fields: tuple[str, ...]) -> None:
    """Refuse tensors that differ from those a plan was made for."""
    for field in fields:
        if getattr(spec, field) != getattr(wanted, field):
            expected = f"{_WORDS.get(field, field)} = {getattr(wanted, field)}, as the plan was made for"
            raise InputError(_ARGUMENT.get(field, "q"), expected, getattr(spec, field))


_ARGUMENT = {"shape_k": "k", "heads_kv": "k", "page_size": "k", "head_dim_v": "v"}
_WORDS = {"shape_q": "tokens", "shape_k": "tokens", "heads_q": "heads", "heads_kv": "heads"}


def _through_torch(plan: Runnable) -> bool:
    """Autograd differentiates the forward's own torch operations."""
    return plan.choice.name == plan.choice.backward.name and plan.choice.name in (Flex.name, Reference.name)


def _gradients(plan: Runnable, spec: CallSpec, deterministic: bool) -> Gradients:
    autograd.refuse_transforms()
    if plan.choice.backward.name is None:
        expected = f"no gradient: {plan.choice.backward.reason} (torch.no_grad(), or backend='reference')"
        raise UnsupportedError("q, k, v" if spec.needs_grad else "learnable_sink", expected, "requires_grad")
    return plan.gradients(deterministic)


def in_order(deterministic: bool | None) -> bool:
    """Gradients must be the same bits in every run: as the call says, or torch's own switch."""
    if deterministic is None:
        return torch.are_deterministic_algorithms_enabled()
    if not isinstance(deterministic, bool):
        raise InputError("deterministic", "True, False or None", repr(deterministic))
    return deterministic


def run_backward(
    plan: Runnable,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    forward: ForwardPass,
    *,
    softmax_scale: float | None,
    softcap: float,
    learnable_sink: torch.Tensor | None,
    deterministic: bool | None,
    of_sink: bool,
) -> autograd.AllGrads:
    """`(dq, dk, dv, dsink)` of a call that `run` made, its tensors as they were given and returned."""
    spec = plan.spec
    options = Options.checked(spec, softmax_scale, softcap, learnable_sink)
    gradients = plan.gradients(in_order(deterministic))
    shapes = [own.shape for own in (forward.q, forward.k, forward.v)]
    if spec.batched:
        q, k, v, out = (own.flatten(0, 1) for own in (forward.q, forward.k, forward.v, forward.out))
        forward = ForwardPass(q, k, v, out, forward.lse.transpose(0, 1).flatten(1))
        dout = None if dout is None else dout.flatten(0, 1)
        dlse = None if dlse is None else dlse.transpose(0, 1).flatten(1)
    *grads, dsink = autograd.all_gradients(gradients, forward, dout, dlse, options, of_sink=of_sink)
    dq, dk, dv = (grad.view(shape) for grad, shape in zip(grads, shapes, strict=True))
    return dq, dk, dv, dsink
