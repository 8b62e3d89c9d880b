"""reference backward: dense attention in torch computed again a few rows at a time.

For any mask, after any forward: it keeps no scores. O(seqlen_q * seqlen_k) work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import BackwardBackend, Gradients, MaskedBatch
from fa4_prefixlm.backends.reference import attend, by_key_head, chunks
from fa4_prefixlm.batch.forward_pass import ForwardPass, Grads
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import Build
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
            own = q[rows].to(wide), k[keys].to(wide), v[keys].to(wide)
            own_dlse = None if dlse is None else dlse[:, rows].to(wide)
            with torch.autocast(q.device.type, enabled=False):
                grads = _of_chunk(*own, dout[rows].to(wide), own_dlse, visible, options)
            dq[rows], dk[keys], dv[keys] = grads[0], dk[keys] + grads[1], dv[keys] + grads[2]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def describe(self) -> str:
        return f"torch {torch.__version__} on {self.batch.spec.device}, computed again in chunks of rows"


def _of_chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    visible: torch.Tensor,
    options: Options,
) -> Grads:
    """`(dq, dk, dv)` of rows of one sequence. By hand: an operator of torch's has no autograd within."""
    out, lse = attend(q, k, v, visible, options)
    groups = k.shape[1]
    scores = torch.einsum("qhgd,khd->hgqk", by_key_head(q, groups), k) * options.softmax_scale
    slope = torch.full_like(scores, options.softmax_scale)
    if options.softcap:
        bent = torch.tanh(scores / options.softcap)
        scores, slope = options.softcap * bent, slope * (1 - bent.square())
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    grouped_lse = lse.view(groups, -1, len(q)).unsqueeze(-1)
    weights = torch.exp(scores.masked_fill(visible.logical_not(), float("-inf")) - grouped_lse)
    grouped_dout = by_key_head(dout, groups)
    through = (out * dout).sum(-1).T if dlse is None else (out * dout).sum(-1).T - dlse
    dweights = torch.einsum("qhgd,khd->hgqk", grouped_dout, v) - through.reshape(groups, -1, len(q)).unsqueeze(-1)
    dscores = weights * dweights * slope
    dq = torch.einsum("hgqk,khd->qhgd", dscores, k).reshape(q.shape)
    dk = torch.einsum("hgqk,qhgd->khd", dscores, by_key_head(q, groups))
    return dq, dk, torch.einsum("hgqk,qhgd->khd", weights, grouped_dout)


class ReferenceBackward(BackwardBackend):
    name = "reference"
    summary = "dense torch, every pair of tokens, computed again"

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None, *, deterministic: bool) -> str | None:
        return None

    def prepare(self, batch: MaskedBatch, *, deterministic: bool) -> DenseGradients:
        return DenseGradients(batch)
