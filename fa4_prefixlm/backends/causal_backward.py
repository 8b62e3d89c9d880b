"""causal backward: FA4's own causal or windowed backward, for batches whose mask is just that."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import BackwardBackend, Gradients, MaskedBatch
from fa4_prefixlm.backends.fa4_verdicts import not_run, own_backward_refusal
from fa4_prefixlm.batch.forward_pass import ForwardPass, Grads
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import BACKWARD_ARGUMENTS, Build
from fa4_prefixlm.fa4.kernels.backward_launch import causal_backward
from fa4_prefixlm.geometry.traits import Traits


@dataclass(frozen=True)
class CausalGradients(Gradients):
    build: Build
    lengths: Lengths
    window: int | None
    deterministic: bool

    def run(self, forward: ForwardPass, dout: torch.Tensor, dlse: torch.Tensor | None, options: Options) -> Grads:
        return causal_backward(
            forward,
            dout,
            dlse,
            build=self.build,
            lengths=self.lengths,
            window=self.window,
            options=options,
            deterministic=self.deterministic,
        )

    def describe(self) -> str:
        what = "causal" if self.window is None else f"causal, window {self.window}"
        return f"{what}{', deterministic' * self.deterministic}{not_run(self.lengths.device)}"


class CausalBackward(BackwardBackend):
    name = "causal"
    summary = "FlashAttention-4's own causal backward: no query token is in a span"

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None, *, deterministic: bool) -> str | None:
        if traits.causal_only is None:
            return "the mask is not plainly causal for the whole batch, as far as the host knows"
        return own_backward_refusal(spec, build, BACKWARD_ARGUMENTS)

    def prepare(self, batch: MaskedBatch, *, deterministic: bool) -> CausalGradients:
        assert batch.traits.causal_only is not None
        return CausalGradients(batch.fa4(), batch.lengths, batch.traits.causal_only.window, deterministic)
