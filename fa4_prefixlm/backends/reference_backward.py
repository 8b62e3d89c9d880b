"""reference backward: dense attention in torch computed again, a few rows at a time, and differentiated by autograd.

For any mask, after any forward: it keeps no scores. O(seqlen_q * seqlen_k) work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import BackwardBackend, ForwardPass, Gradients, Grads, MaskedBatch
from fa4_prefixlm.backends.reference import attend, chunks
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.build.describe import Build
from fa4_prefixlm.geometry.traits import Traits


@dataclass(frozen=True)
class DenseGradients(Gradients):
    batch: MaskedBatch

    def run(self, forward: ForwardPass, dout: torch.Tensor, dlse: torch.Tensor | None, options: Options) -> Grads:
        batch = self.batch
        wide = torch.float64 if forward.q.dtype == torch.float64 else torch.float32
        q, k, v = forward.q.detach(), forward.k.detach(), forward.v.detach()
        dq, dk, dv = (torch.zeros_like(own, dtype=wide) for own in (q, k, v))
        spans = {name: own.on_host() for name, own in batch.spans.items()}
        pieces = chunks(q, batch.mask, spans, batch.lengths.on_host(), batch.lengths.starts_on_host())
        for rows, keys, visible in pieces:
            own = q[rows].to(wide, copy=True), k[keys].to(wide, copy=True), v[keys].to(wide, copy=True)
            for leaf in own:
                leaf.requires_grad_()
            with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
                out, lse = attend(*own, visible, options)
            wanted, grads = [out], [dout[rows].to(wide)]
            if dlse is not None:
                wanted.append(lse)
                grads.append(dlse[:, rows].to(wide).masked_fill(lse == float("-inf"), 0))
            own_q, own_k, own_v = torch.autograd.grad(wanted, own, grads)
            dq[rows], dk[keys], dv[keys] = own_q, dk[keys] + own_k, dv[keys] + own_v
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def describe(self) -> str:
        return f"torch {torch.__version__} on {self.batch.spec.device}, computed again in chunks of rows"


class ReferenceBackward(BackwardBackend):
    name = "reference"
    summary = "dense torch, every pair of tokens, computed again"

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None, *, deterministic: bool) -> str | None:
        return None

    def prepare(self, batch: MaskedBatch, *, deterministic: bool) -> DenseGradients:
        return DenseGradients(batch)
