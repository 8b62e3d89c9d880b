"""What the GPU tests of the backward, its fuzzer and its benchmark share: one call's gradients, FA4's error band."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from fa4_prefixlm.backends.reference import attend, by_key_head, chunks
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.ranges import HostSpans, by_name
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.prefix_lm import PrefixLM
from fa4_prefixlm.runtime.plans import Plan
from fa4_prefixlm.runtime.plans import plan as make_plan
from fa4_prefixlm.runtime.public_call import attention
from fa4_prefixlm.testing.accuracy import Gradients, exact_gradients, relative_error, worst_row
from fa4_prefixlm.testing.batches import Batch
from fa4_prefixlm.testing.poison import poison_free_memory

NAMES = ("q", "k", "v", "sink")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What decides the generated kernels."""

    dims: tuple[int, int]
    heads: tuple[int, int] = (4, 2)
    dtype: torch.dtype = torch.bfloat16
    softcap: float = 0.0
    sink: bool = False
    with_lse: bool = False

    def __str__(self) -> str:
        extras = f"{'-softcap' * bool(self.softcap)}{'-sink' * self.sink}{'-lse' * self.with_lse}"
        return f"{self.dims[0]}x{self.dims[1]}-{self.heads[0]}/{self.heads[1]}-{str(self.dtype)[6:]}{extras}"


@dataclasses.dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None
    options: Options


def inputs_of(kind: Kind, batch: Batch, seed: int, device: str = "cuda") -> Inputs:
    q, k, v = batch.tensors(kind.heads, kind.dims, kind.dtype, device, seed)
    dout = batch.tensors(kind.heads, (kind.dims[1],) * 2, kind.dtype, device, seed + 1)[0]
    dlse = batch.tensors(kind.heads, (1, 1), torch.float32, device, seed + 2)[0][:, :, 0].T if kind.with_lse else None
    generator = torch.Generator(device).manual_seed(seed)
    sink = torch.randn(kind.heads[0], device=device, generator=generator) if kind.sink else None
    return Inputs(q, k, v, dout, dlse, Options(kind.dims[0] ** -0.5, kind.softcap, sink))


def gradients_of(own: Inputs, plan: Plan, deterministic: bool | None = None) -> Gradients:
    """By the public call and autograd, into poisoned memory."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in (own.q, own.k, own.v))
    sink = None if own.options.learnable_sink is None else own.options.learnable_sink.detach().requires_grad_()
    out, lse = attention(
        q,
        k,
        v,
        plan,
        return_lse=True,
        softmax_scale=own.options.softmax_scale,
        softcap=own.options.softcap,
        learnable_sink=sink,
        deterministic=deterministic,
    )
    if own.q.is_cuda:
        poison_free_memory()
    wanted, grads = [out], [own.dout]
    if own.dlse is not None:
        wanted.append(lse)
        grads.append(own.dlse)
    return Gradients(*torch.autograd.grad(wanted, [q, k, v, *([] if sink is None else [sink])], grads))


def exact_of(own: Inputs, batch: Batch, mask: Mask, spans: HostSpans | None = None) -> Gradients:
    return exact_gradients(
        *(own.q, own.k, own.v, own.dout, own.dlse),
        mask=mask,
        spans=batch.spans if spans is None else spans,
        seqlens=batch.as_seqlens,
        options=own.options,
    )


def forward_of(own: Inputs, plan: Plan) -> torch.Tensor:
    """The output that the plan's backward is given."""
    options = own.options
    with torch.no_grad():
        return attention(
            own.q,
            own.k,
            own.v,
            plan,
            softmax_scale=options.softmax_scale,
            softcap=options.softcap,
            learnable_sink=options.learnable_sink,
        )


def rounded_of(own: Inputs, batch: Batch, mask: Mask, out: torch.Tensor) -> Gradients:
    """What FA4's arithmetic makes of the forward's `out`: P, dS and the results are rounded to its dtype.

    The rest is in float64. So a row's error here is what no kernel with these roundings can avoid, under this mask,
    after this forward.
    """
    dtype, options = own.q.dtype, own.options
    q, k, v, dout = (each.double() for each in (own.q, own.k, own.v, own.dout))
    dq, dk, dv = (torch.zeros_like(each) for each in (q, k, v))
    sink = None if options.learnable_sink is None else options.learnable_sink.double()
    dsink = None if sink is None else torch.zeros_like(sink)
    named = dict.fromkeys(by_name(mask, batch.spans), batch.spans)
    wide = dataclasses.replace(options, learnable_sink=sink)

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return values.to(dtype).double()

    for rows, keys, visible in chunks(q, mask, named, batch.as_seqlens):
        groups = k.shape[1]
        _, lse = attend(q[rows], k[keys], v[keys], visible, wide)
        grouped = [by_key_head(each[rows], groups) for each in (q, dout)]
        scores, slope = torch.einsum("qhgd,khd->hgqk", grouped[0], k[keys]) * options.softmax_scale, q.new_ones(())
        if options.softcap:
            bent = torch.tanh(scores / options.softcap)
            scores, slope = options.softcap * bent, 1 - bent.square()
        safe = lse.masked_fill(lse == float("-inf"), 0).view(groups, -1, lse.shape[1], 1)
        weights = torch.exp(scores.masked_fill(~visible, float("-inf")) - safe)
        through = (out[rows].double() * dout[rows]).sum(-1).T
        if own.dlse is not None:
            own_dlse = own.dlse[:, rows].double().masked_fill(lse == float("-inf"), 0)
            through = through - own_dlse
        products = torch.einsum("qhgd,khd->hgqk", grouped[1], v[keys])
        dscores = rounded(weights * (products - through.view(groups, -1, lse.shape[1], 1)) * slope)
        dq[rows] = torch.einsum("hgqk,khd->qhgd", dscores, k[keys]).reshape(q[rows].shape) * options.softmax_scale
        dk[keys] += torch.einsum("hgqk,qhgd->khd", dscores, grouped[0]) * options.softmax_scale
        dv[keys] += torch.einsum("hgqk,qhgd->khd", rounded(weights), grouped[1])
        if sink is not None and dsink is not None:
            dsink -= (torch.exp(sink[:, None] - lse) * through).sum(1)
    return Gradients(rounded(dq), rounded(dk), rounded(dv), dsink)


@dataclasses.dataclass(frozen=True)
class Errors:
    """By name of the gradient: relative error of the whole, and of the worst row (`worst_row`)."""

    whole: dict[str, float]
    row: dict[str, float]

    def within(self, band: Errors, slack: float, row_slack: float) -> list[str]:
        """What is outside of `slack` times the band; empty if nothing is."""
        found = []
        for name, error in self.whole.items():
            if not error <= slack * band.whole[name]:  # a NaN is outside
                found.append(f"d{name} {error:.2e}, {slack * band.whole[name]:.2e} allowed")
        for name, error in self.row.items():
            if not error <= row_slack * band.row[name]:
                found.append(f"a row of d{name} {error:.2e}, {row_slack * band.row[name]:.2e} allowed")
        return found

    def __str__(self) -> str:
        return " ".join(f"d{name} {error:.1e} (row {self.row.get(name, 0):.1e})" for name, error in self.whole.items())


def errors_of(got: Gradients, exact: Gradients) -> Errors:
    pairs = [(name, getattr(got, name), getattr(exact, name)) for name in NAMES if getattr(exact, name) is not None]
    # A token that sees one key has no gradient but what is rounded in it, which is measured against 1.
    pairs = [
        (name, mine.double() + 1, right + 1) if _is_0(right) else (name, mine, right) for name, mine, right in pairs
    ]
    whole = {name: relative_error(mine, right) for name, mine, right in pairs}
    return Errors(whole, {name: worst_row(mine, right) for name, mine, right in pairs if mine.ndim == 3})


def _is_0(gradient: torch.Tensor) -> bool:
    return gradient.numel() > 0 and float(gradient.abs().max()) < 1e-9


# What FA4's own backward is off by where it is the least: a batch of a few rows has no band of its own.
TYPICAL = {torch.bfloat16: (2.0e-3, 5e-3), torch.float16: (3e-4, 7e-4)}


def band_of(own: Inputs, batch: Batch, mask: Mask, exact: Gradients, plan: Plan) -> Errors:
    """What a gradient may be off by: the whole as FA4's own causal backward on these very tensors, with and without
    the window; its worst row, and the sinks, as FA4's roundings after this very forward.

    Rows of another mask are no band for a row: the shorter it is, the more its rounding errors weigh in it.
    """
    rounding = errors_of(rounded_of(own, batch, mask, forward_of(own, plan)), exact)
    found = [*_causal_errors(own, batch, getattr(mask, "window", None))]
    # Where FA4's own backward does not take the head dim there is no band but the roundings.
    whole, row = TYPICAL[own.q.dtype]
    wholes = {name: max(each.whole[name] for each in found or [rounding]) for name in rounding.whole}
    if "sink" in wholes:  # of a few numbers
        wholes["sink"] = max(wholes["sink"], rounding.whole["sink"])
    return Errors(
        {name: max(whole, error) for name, error in wholes.items()},
        {name: max(row, error) for name, error in rounding.row.items()},
    )


def _causal_errors(own: Inputs, batch: Batch, window: int | None) -> Iterator[Errors]:
    nothing = tuple(() for _ in batch.spans)
    for each in {None, window}:
        mask = PrefixLM(each)
        plan = make_plan(
            [[] for _ in batch.spans],
            like=(own.q, own.k, own.v),
            cu_seqlens_q=batch.cu_q,
            cu_seqlens_k=batch.cu_k,
            mask=mask,
            backend="causal",
        )
        if plan.choice.backward.name == "causal":
            yield errors_of(gradients_of(own, plan), exact_of(own, batch, mask, nothing))


def plan_of(own: Inputs, batch: Batch, mask: Mask, backward: str = "auto", backend: str = "auto") -> Plan:
    return make_plan(
        [list(each) for each in batch.spans],
        like=(own.q, own.k, own.v),
        cu_seqlens_q=batch.cu_q,
        cu_seqlens_k=batch.cu_k,
        mask=mask,
        backend=backend,
        backward=backward,
    )
