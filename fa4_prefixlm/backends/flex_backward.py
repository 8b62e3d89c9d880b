"""flex backward: the backward of torch's FlexAttention.

After a forward on `flex` in eager code autograd takes it by itself. After any other, or where autograd does not see the
forward (compiled models), the forward is computed again with its gradient.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import BackwardBackend, Gradients, MaskedBatch
from fa4_prefixlm.backends.flex import FlexCall, flex_call, flex_refusal
from fa4_prefixlm.batch.forward_pass import ForwardPass, Grads
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry.traits import Traits


@dataclass(frozen=True)
class FlexGradients(Gradients):
    """call: the forward, to be computed again."""

    call: FlexCall

    def run(self, forward: ForwardPass, dout: torch.Tensor, dlse: torch.Tensor | None, options: Options) -> Grads:
        sink = options.learnable_sink
        options = dataclasses.replace(options, learnable_sink=None if sink is None else sink.detach())
        with torch.enable_grad():
            q, k, v = (own.detach().requires_grad_() for own in (forward.q, forward.k, forward.v))
            out, lse = self.call.run(q, k, v, options, None)
        outputs, grads = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
        dq, dk, dv = torch.autograd.grad(outputs, (q, k, v), grads)
        return dq, dk, dv

    def describe(self) -> str:
        (_, kernel), *_ = self.call.describe()
        return kernel


class FlexBackward(BackwardBackend):
    name = "flex"
    summary = "the backward of torch's FlexAttention over the batch as a single sequence, block-sparse"

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None, *, deterministic: bool) -> str | None:
        # Deterministic: one program writes each block of dq, of dk and of dv, in a fixed order, and nothing is added
        # by atomics but to gradients of tensors that the mask reads; ours are integers.
        if spec.device.type == "cpu":
            return "FlexAttention has no backward on the CPU"
        return flex_refusal(spec)

    def prepare(self, batch: MaskedBatch, *, deterministic: bool) -> FlexGradients:
        return FlexGradients(flex_call(batch))
