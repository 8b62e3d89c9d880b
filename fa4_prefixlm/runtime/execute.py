"""Run a plan on tensors: the checks of a call, and the launch. Every way of calling `attention` ends here."""

from __future__ import annotations

from typing import Protocol

import torch

from fa4_prefixlm.backends.base import Prepared
from fa4_prefixlm.backends.select import Choice
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec, check_out, describe
from fa4_prefixlm.errors import InputError, UnsupportedError

Pair = tuple[torch.Tensor, torch.Tensor]


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
) -> Pair:
    """Check the call and run the plan: `(out, lse)`.

    Args:
        spec: what the tensors look like, where that is known and is what the plan was made for.
    """
    if spec is None:
        spec = describe(q, k, v, cache=plan.spec.cache)
        plan.check(spec)
    check_out(out, spec)
    options = Options.checked(spec, softmax_scale, softcap, learnable_sink)
    _check_gradients(plan, spec, learnable_sink)
    if spec.batched:
        q = q.flatten(0, 1)
        if spec.page_size is None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        out = out.flatten(0, 1) if out is not None else None
    result, lse = plan.prepared.run(q, k, v, options, out)
    if spec.batched:
        result = result.unflatten(0, spec.shape_q)
        lse = lse.unflatten(1, spec.shape_q).transpose(0, 1)
    return result, lse


def check_same(spec: CallSpec, wanted: CallSpec, fields: tuple[str, ...]) -> None:
    """Refuse tensors that differ from those a plan was made for."""
    for field in fields:
        if getattr(spec, field) != getattr(wanted, field):
            expected = f"{field} = {getattr(wanted, field)}, as the plan was made for"
            raise InputError(_ARGUMENT.get(field, "q"), expected, getattr(spec, field))


_ARGUMENT = {"shape_k": "k", "heads_kv": "k", "page_size": "k", "head_dim_v": "v"}


def _check_gradients(plan: Runnable, spec: CallSpec, learnable_sink: torch.Tensor | None) -> None:
    if not torch.is_grad_enabled() or plan.choice.backward.name is not None:
        return
    reason = plan.choice.backward.reason
    expected = f"no gradient: {reason} (torch.no_grad(), or backend='reference')"
    if spec.needs_grad:
        raise UnsupportedError("q, k, v", expected, "requires_grad")
    if learnable_sink is not None and learnable_sink.requires_grad:
        raise UnsupportedError("learnable_sink", expected, "requires_grad")
