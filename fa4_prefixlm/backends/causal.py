"""causal: FA4's own causal or windowed call, for batches whose mask is just that. PrefixLM costs them nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..call import CallSpec
from ..fa4.build import Build
from ..fa4.launch import Keys, causal_forward
from ..intervals import Demand
from .base import Backend, Options, Prepared, Work
from .fa4_common import causal_refusal, kernel_line


@dataclass
class CausalCall(Prepared):
    """One causal call."""

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
            softmax_scale=options.softmax_scale,
            softcap=options.softcap,
            learnable_sink=options.learnable_sink,
            out=out,
        )

    def describe(self) -> list[tuple[str, str]]:
        what = "causal" if self.window is None else f"causal, window {self.window}"
        return [kernel_line(self.build, self.cu_seqlens_q.device, what)]


class Causal(Backend):
    name = "causal"
    summary = "FlashAttention-4's own causal call: no query token is in a span"
    reads_pages = True

    def refusal(self, call: CallSpec, demand: Demand, build: Build | None) -> str | None:
        if demand.plain is None:
            return "the mask is not plainly causal for the whole batch, as far as the host knows"
        return causal_refusal(call, build)

    def prepare(self, work: Work) -> CausalCall:
        assert work.demand.plain is not None
        return causal_call(work, work.demand.plain.window)


def causal_call(work: Work, window: int | None) -> CausalCall:
    """The build's own causal or windowed call over the whole batch."""
    return CausalCall(
        build=work.fa4(),
        cu_seqlens_q=work.lengths.cu_seqlens_q,
        max_seqlen_q=work.lengths.max_seqlen_q,
        keys=keys_of(work),
        window=window,
    )


def keys_of(work: Work) -> Keys:
    """Where the kernel finds the keys."""
    if work.pages is None:
        return Keys(work.lengths.max_seqlen_k, cu_seqlens_k=work.lengths.cu_seqlens_k)
    return Keys(work.lengths.max_seqlen_k, seqused_k=work.pages.seqused_k, page_table=work.pages.table)
