"""two-pass: the build's own causal call, then a kernel of ours that adds what it left out of each span.

The two key sets are disjoint, so the result is exact: the first pass shows a row the keys up to its own (and within the
window), the second the rest of its interval, on top of the first one's softmax. Runs on any build with a causal varlen
call that returns the LSE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..call import CallSpec
from ..fa4.build import Build
from ..intervals import Demand
from .base import Backend, Options, Prepared, Work
from .causal import CausalCall, causal_call
from .fa4_common import causal_refusal


@dataclass
class TwoPasses(Prepared):
    """bounds: `(at least total_q, 2)` int32, the interval `[lo, hi)` of each row."""

    causal: CausalCall
    bounds: torch.Tensor

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from ..kernels.span_rest import add_span_rest  # which imports Triton

        out, lse = self.causal.run(q, k, v, options, out)
        if isinstance(q, FakeTensor):  # cross-compiling
            return out, lse
        keys = self.causal.keys
        add_span_rest(
            q,
            k,
            v,
            out,
            lse,
            bounds=self.bounds,
            cu_seqlens_q=self.causal.cu_seqlens_q,
            cu_seqlens_k=keys.cu_seqlens_k,
            seqused_k=keys.seqused_k,
            page_table=keys.page_table,
            window=self.causal.window,
            softmax_scale=options.softmax_scale,
            softcap=options.softcap,
        )
        return out, lse

    def describe(self) -> list[tuple[str, str]]:
        (label, kernel), *more = self.causal.describe()
        return [
            (label, f"{kernel}, then the rest of each span (Triton)"),
            *more,
            ("memory", f"bounds {self.bounds.nbytes / 2**20:.2f} MiB"),
        ]


class TwoPass(Backend):
    name = "two_pass"
    summary = "FlashAttention-4's own causal call, then the rest of each span"
    reads_pages = True

    def refusal(self, call: CallSpec, demand: Demand, build: Build | None) -> str | None:
        if demand.within is None or demand.intervals > 1:
            return "the mask is no causal pass and the rest of one span set"
        return causal_refusal(call, build)

    def prepare(self, work: Work) -> TwoPasses:
        assert work.demand.within is not None
        causal = causal_call(work, work.demand.within.window)
        return TwoPasses(causal, torch.cat([work.bounds.lo, work.bounds.hi], dim=1))
