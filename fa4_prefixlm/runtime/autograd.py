"""Attention as one differentiable operation: a forward of any backend, and the backward that was chosen before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fa4_prefixlm.backends.base import Gradients, Prepared
from fa4_prefixlm.batch.forward_pass import ForwardPass
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.errors import UnsupportedError

Pair = tuple[torch.Tensor, torch.Tensor]
AllGrads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]

# Elements of `out` that the sinks' gradient widens to float32 at a time.
SINK_CHUNK = 2**22


def is_needed(*tensors: torch.Tensor | None) -> bool:
    """Autograd will ask for the gradient of one of these."""
    if torch.is_grad_enabled():
        for own in tensors:
            if own is not None and own.requires_grad:
                return True
    return False


def refuse_transforms() -> None:
    """Refuse `torch.func` (grad, vmap, ...), which would trace through a kernel launch."""
    if torch._C._functorch.maybe_current_level() is not None:
        raise UnsupportedError("q, k, v", "no torch.func transform (backend='reference' takes them)", "one")


@dataclass(frozen=True)
class Call:
    """A forward, its backward, and the options of both."""

    forward: Prepared
    gradients: Gradients
    options: Options


def differentiable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Pair:
    """`(out, lse)` of packed tensors, both differentiable in q, k, v and the sinks."""
    return _Attention.apply(q, k, v, call.options.learnable_sink, call)


def all_gradients(
    gradients: Gradients,
    forward: ForwardPass,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    options: Options,
    *,
    of_sink: bool,
) -> AllGrads:
    """`(dq, dk, dv, dsink)` of packed tensors. dout, dlse: None where nobody used the output.

    of_sink: whether the last is wanted; None if not.
    """
    if dout is None:
        dout = torch.zeros_like(forward.out)
    if 0 in dout.stride():  # expanded, as the gradient of a sum is
        dout = dout.contiguous()
    if dlse is not None:
        # The LSE of a row that sees nothing is constant; and 0 times what comes back for it must be 0.
        dlse = dlse.float().masked_fill(forward.lse == float("-inf"), 0)
    dsink = _sink_gradient(forward, dout, dlse, options) if of_sink else None
    return *gradients.run(forward, dout, dlse, options), dsink


def _sink_gradient(
    forward: ForwardPass, dout: torch.Tensor, dlse: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """A sink takes its share of every row's softmax, and carries no value: `sum(share * (dlse - dout @ out))`."""
    assert options.learnable_sink is not None
    out, lse, sink = forward.out, forward.lse, options.learnable_sink.float()
    share = torch.exp(sink.unsqueeze(1) - lse).masked_fill(lse == float("-inf"), 0)
    total = torch.zeros_like(sink) if dlse is None else (share * dlse).sum(1)
    rows = max(1, SINK_CHUNK // (out.shape[1] * out.shape[2]))
    for begin in range(0, out.shape[0], rows):
        own = slice(begin, begin + rows)
        total = total - (share[:, own].T * (out[own].float() * dout[own].float()).sum(2)).sum(0)
    return total.to(options.learnable_sink.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, call: Call
    ) -> Pair:
        out, lse = call.forward.run(q, k, v, call.options, None)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        of_sink = ctx.needs_input_grad[3]
        found = _FirstDerivative.apply(*grads, *ctx.saved_tensors, ctx.call, of_sink)
        return *(grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad, strict=False)), None


class _FirstDerivative(torch.autograd.Function):
    """The gradients as an operation of its own, to say clearly that they have no derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        dout: torch.Tensor | None,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: Call,
        of_sink: bool,
    ) -> AllGrads:
        return all_gradients(call.gradients, ForwardPass(q, k, v, out, lse), dout, dlse, call.options, of_sink=of_sink)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        refuse_second_derivative()


def refuse_second_derivative() -> None:
    """There is no kernel for it."""
    raise UnsupportedError("q, k, v", "no second derivative (backend='reference' has one in eager code)", "one")
