"""causal: FA4's own causal or windowed call, for batches whose mask is no more than that."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import Backend, MaskedBatch, Prepared
from fa4_prefixlm.backends.fa4_verdicts import causal_refusal, kernel_line
from fa4_prefixlm.backends.rows import ANY_TILE, kernel_rows
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.fa4.kernels.launch import causal_forward
from fa4_prefixlm.geometry.traits import Traits


@dataclass
class CausalCall(Prepared):
    """One causal call.

    Attributes:
        build: the FA4 that makes it.
        cu_seqlens_q: `(batch + 1,)` int32 on the device.
        max_seqlen_q: query tokens of the longest sequence.
        keys: where the keys are.
        window: in tokens, the row's own included; None: no window.
    """

    build: Build
    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int
    keys: Keys
    window: int | None

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return causal_forward(
            q,
            k,
            v,
            build=self.build,
            cu_seqlens_q=self.cu_seqlens_q,
            max_seqlen_q=self.max_seqlen_q,
            keys=self.keys,
            window=self.window,
            options=options,
            out=out,
        )

    def describe(self) -> list[tuple[str, str]]:
        what = "causal" if self.window is None else f"causal, window {self.window}"
        return [kernel_line(self.build, self.cu_seqlens_q.device, what)]


class Causal(Backend):
    name = "causal"
    summary = "FlashAttention-4's own causal call: no query token is in a span"
    reads_pages = True
    reads_kernel_rows = True

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None) -> str | None:
        if traits.causal_only is None:
            return "the mask is not causal for the whole batch, as far as the host knows"
        return causal_refusal(spec, build)

    def prepare(self, batch: MaskedBatch) -> CausalCall:
        assert batch.traits.causal_only is not None
        if batch.in_one_launch and not batch.known_on_host:
            kernel_rows(batch, *ANY_TILE)  # for its checks: FA4's kernel reads none of it
        return causal_call(batch, batch.traits.causal_only.window)


def causal_call(batch: MaskedBatch, window: int | None) -> CausalCall:
    """The build's own causal or windowed call over the whole batch."""
    return CausalCall(
        build=batch.fa4(),
        cu_seqlens_q=batch.lengths.cu_seqlens_q,
        max_seqlen_q=batch.lengths.max_seqlen_q,
        keys=batch.keys,
        window=window,
    )
