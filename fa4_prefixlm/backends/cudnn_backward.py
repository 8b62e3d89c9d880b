"""cudnn backward: that of `cudnn.flex_attention`, after any exact forward. Its plan is read back, once a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fa4_prefixlm.backends.base import BackwardBackend, Gradients, MaskedBatch
from fa4_prefixlm.backends.cudnn import FlexFor, aligned, api, cudnn_refusal, in_use, is_plain, mask_plan
from fa4_prefixlm.backends.flex_backward import FlexGradients
from fa4_prefixlm.batch.forward_pass import ForwardPass, Grads
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.geometry.traits import Traits


@dataclass
class CudnnGradients(Gradients):
    """One backward of cuDNN's.

    Attributes:
        plan: its own plan of the mask; None: there are no keys.
        blind: `(total_q,)` bool, rows that see nothing; None: there is none.
        unseen: `(total_k,)` bool, keys that no row sees; None: there is none.
        or_flex: computes those of calls with a softcap or sinks; None: they are refused.
    """

    plan: Any
    blind: torch.Tensor | None
    unseen: torch.Tensor | None
    or_flex: FlexFor | None = None
    _compiled: dict[bool, Any] = field(default_factory=dict)

    def run(self, forward: ForwardPass, dout: torch.Tensor, dlse: torch.Tensor | None, options: Options) -> Grads:
        if not is_plain(options, self.or_flex):
            assert self.or_flex is not None
            return FlexGradients(self.or_flex.call).run(forward, dout, dlse, options)
        if self.plan is None:
            return torch.zeros_like(forward.q), torch.zeros_like(forward.k), torch.zeros_like(forward.v)
        # Of a row that sees nothing, whose scores are all masked, any finite LSE gives weights of 0.
        lse = forward.lse.masked_fill(forward.lse == float("-inf"), 0)
        reads = [aligned(own.detach()).unsqueeze(0) for own in (*forward[:4], dout, lse)]
        grads = [torch.empty_like(own) for own in reads[:3]]
        of_lse = None if dlse is None else aligned(dlse).unsqueeze(0)
        call = self._call(reads, grads, of_lse)
        room = torch.empty(call.workspace_size, dtype=torch.uint8, device=lse.device)
        call.execute(*reads, *grads, self.plan, of_lse, workspace=room, softmax_scale=options.softmax_scale)
        dq, dk, dv = (own.squeeze(0) for own in grads)
        if self.blind is not None:
            dq.masked_fill_(self.blind[:, None, None], 0)
        if self.unseen is not None:
            for own in (dk, dv):
                own.masked_fill_(self.unseen[:, None, None], 0)
        return dq, dk, dv

    def describe(self) -> str:
        also = ", softcap and sinks on flex" * (self.or_flex is not None)
        return f"cudnn.flex_attention, its order of writes differs from run to run{also}"

    def _call(self, reads: list[torch.Tensor], grads: list[torch.Tensor], of_lse: torch.Tensor | None) -> Any:
        """Its compiled form, the same for all layers."""
        wanted = of_lse is not None
        if wanted not in self._compiled:
            call = api().FlexAttentionBwd(*reads, *grads, self.plan, of_lse)
            call.check_support()
            call.compile()
            self._compiled[wanted] = call
        return self._compiled[wanted]


class CudnnBackward(BackwardBackend):
    name = "cudnn"
    summary = "the backward of cudnn.flex_attention over the batch as a single sequence, block-sparse"

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None, *, deterministic: bool) -> str | None:
        if traits.tagged:
            return "it takes intervals, and a block of spans has none that kernels count"
        if deterministic:
            return "its deterministic order was not tried"
        if spec.head_dim != spec.head_dim_v and spec.heads_q != spec.heads_kv:
            return "the backward of cudnn.flex_attention takes unequal head dims with as many key heads as query heads"
        if spec.arch // 10 == 10 and spec.head_dim > 128:
            return "the backward of cudnn.flex_attention at this head dim has no gradient of the LSE on SM100"
        return cudnn_refusal(spec)

    def prepare(self, batch: MaskedBatch, *, deterministic: bool) -> CudnnGradients:
        bounds, keys = in_use(batch.packed_bounds), batch.lengths.total_k
        blind, unseen = (bounds.lo >= bounds.hi).all(1), unseen_keys(bounds, keys)
        plan = mask_plan(batch, bounds, with_backward=True) if keys else None
        return CudnnGradients(plan, blind if blind.any() else None, unseen if unseen.any() else None)


def unseen_keys(bounds: Bounds, keys: int) -> torch.Tensor:
    """`(keys,)` bool: the keys that no row sees, of bounds that count the packed keys."""
    steps = torch.zeros(keys + 1, dtype=torch.int32, device=bounds.lo.device)
    one = (bounds.lo < bounds.hi).to(torch.int32).flatten()
    for edge, sign in ((bounds.lo, 1), (bounds.hi, -1)):
        steps = steps.scatter_add(0, edge.clamp(0, keys).long().flatten(), one * sign)
    return steps.cumsum(0).narrow(0, 0, keys) <= 0
