"""two_pass: the build's own causal call, then a Triton kernel that adds what it left out of each span.

The two key sets are disjoint, so the result is exact: the first pass shows a row the keys up to its own (and within the
window), the second the rest of its interval, on top of the first one's softmax. Runs on any build with a causal varlen
call that returns the LSE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import Backend, MaskedBatch, Prepared
from fa4_prefixlm.backends.causal import CausalCall, causal_call
from fa4_prefixlm.backends.fa4_verdicts import causal_refusal
from fa4_prefixlm.backends.rows import ANY_TILE, kernel_rows
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.device_checks import is_fake
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry.traits import Traits


@dataclass
class TwoPasses(Prepared):
    """A causal call, and what the second pass needs.

    Attributes:
        causal: the first pass.
        bounds: `(at least total_q, 2)` int32 on the device, the interval `[lo, hi)` of each row.
    """

    causal: CausalCall
    bounds: torch.Tensor

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from fa4_prefixlm.kernels.span_rest import add_span_rest

        out, lse = self.causal.run(q, k, v, options, out)
        if is_fake(q):  # cross-compiling
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
            options=options,
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
    reads_kernel_rows = True

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None) -> str | None:
        if traits.causal_part is None or traits.intervals > 1:
            return "the mask is not a causal pass plus the rest of spans"
        return causal_refusal(spec, build)

    def prepare(self, batch: MaskedBatch) -> TwoPasses:
        assert batch.traits.causal_part is not None
        causal = causal_call(batch, batch.traits.causal_part.window)
        return TwoPasses(causal, kernel_rows(batch, *ANY_TILE).bounds)
