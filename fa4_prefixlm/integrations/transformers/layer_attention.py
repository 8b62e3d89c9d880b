"""The attention function that is registered with transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fa4_prefixlm.backends.fa4_verdicts import causal_refusal
from fa4_prefixlm.batch.arguments import BatchArguments
from fa4_prefixlm.batch.tensors import CallSpec, describe
from fa4_prefixlm.errors import InputError, UnsupportedError
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.geometry.traits import MOST_INTERVALS
from fa4_prefixlm.integrations.transformers import masks
from fa4_prefixlm.integrations.transformers.masks import FEW_QUERIES, Record, warn_once
from fa4_prefixlm.masks.atoms import causal, window
from fa4_prefixlm.runtime.bounded_plans import BoundedBatch
from fa4_prefixlm.runtime.execute import run
from fa4_prefixlm.runtime.plans import Plan, plan_for

# So many queries of a layer whose head dim FA4 lacks run FlexAttention: at 16384 tokens on an H100 it is 3.7 times as
# fast as SDPA with a dense mask, as transformers calls it. For few, compiling it costs more than it saves; where that
# ends was not measured.
FLEX_FROM = 2048
WIDEST_OF_FA4 = 256

# What models give their attention function that changes scores, or says which there are, and nothing here takes.
OTHER_SCORES = ("indices", "block_indices", "sinks")

Output = tuple[torch.Tensor, None]


@dataclasses.dataclass(frozen=True)
class Call:
    """One layer's call. The tensors are transformers': `(batch, heads, tokens, head_dim)`.

    Attributes:
        module: the attention module.
        rest: what transformers passes on that SDPA reads too.
    """

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float | None
    softcap: float
    sink: torch.Tensor | None
    is_causal: bool | None
    rest: dict[str, Any]

    @property
    def needs_grad(self) -> bool:
        tensors = (self.query, self.key, self.value, *(() if self.sink is None else (self.sink,)))
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def packed(self, end: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v as this library has them: `(batch, tokens, heads, head_dim)`; of the keys those before `end`."""
        key, value = self.key[:, :, :end], self.value[:, :, :end]
        return self.query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> Output:
    """Attention of one layer. Registered as `fa4_prefixlm` with `AttentionInterface`.

    Args:
        module: the attention module, of which only `is_causal` is read.
        query: `(batch, heads, q, head_dim)`.
        key, value: `(batch, kv_heads, kv, head_dim)`.
        attention_mask: what the registered mask function returned, or a dense mask.
        dropout: 0.0; anything else is refused.
        scaling: of the scores; None: `1 / sqrt(head_dim)`.
        is_causal: where there is no mask, instead of the module's.
        softcap: of the scores; None is none.
        s_aux: `(heads,)` sinks.

    Returns:
        `(batch, q, heads, head_dim)`, and None for the weights, which no kernel has.

    Raises:
        InputError: the call can't be run exactly; nothing was launched.
    """
    if dropout:
        raise InputError("attention_dropout", "0.0: no kernel of this library drops weights out", dropout)
    for name in OTHER_SCORES:
        if kwargs.get(name) is not None:
            expected = "None: no kernel of this library, nor SDPA, takes it (attn_implementation='eager' may)"
            raise UnsupportedError(name, expected, type(kwargs[name]).__name__)
    if kwargs.get("output_attentions"):
        warn_once("fa4_prefixlm: there are no attention weights to return; attn_implementation='eager' has them")
    query, key, value = _in_autocast(query, key, value)
    call = Call(module, query, key, value, scaling, float(softcap or 0.0), s_aux, is_causal, kwargs)
    if attention_mask is None:
        if "read_index" in kwargs:  # its masks are lengths, and nobody says which tokens are of an image
            expected = "a mask: continuous batching has none (transformers takes sdpa, paged|eager or flash for it)"
            raise UnsupportedError("attention_mask", expected, None)
        return dense(call, None)
    if attention_mask.dtype != torch.int32:
        return dense(call, attention_mask)
    width = attention_mask.shape[-1] if attention_mask.ndim == 4 else 0
    rows_fit = attention_mask.shape[:3] == (query.shape[0], 1, query.shape[2])
    if not rows_fit or width not in (2, 2 * MOST_INTERVALS):
        expected = f"row bounds {(query.shape[0], 1, query.shape[2], '2 n')}, as its mask function returned them"
        hint = "does the model change its masks? A dense mask of your own is bool or floating point"
        raise InputError("attention_mask", f"{expected} ({hint})", f"int32 {tuple(attention_mask.shape)}")
    in_graph = torch.compiler.is_compiling()
    if call.rest.get("position_bias") is not None or query.shape[2] <= FEW_QUERIES:
        keys = key.shape[2]
        return dense(
            call,
            torch.ops.fa4_prefixlm.dense_mask(attention_mask, keys)
            if in_graph
            else masks.found(attention_mask, keys).as_dense(),
        )
    if in_graph:
        return _in_graph(call, attention_mask)
    flex = not call.needs_grad and query.shape[2] >= FLEX_FROM
    return under(call, attention_mask, masks.known(attention_mask, key.shape[2]), flex=flex)


def under(call: Call, bounds: torch.Tensor, record: Record, *, flex: bool) -> Output:
    """Under row bounds that were read, with a plan that all layers of the kind share.

    flex: FlexAttention may run head dims that FA4 lacks.
    """
    bounds = record.in_several() if record.uses_several else bounds
    assert record.seen is not None
    if record.seen.overflow:
        mask = record.as_dense()  # or there is none, and nothing to warn of
        warn_once(
            f"fa4_prefixlm: a row of the mask may see more than {bounds.shape[3] // 2} runs of keys, which its kernels "
            "do not take: SDPA runs such batches, under its own dense mask"
        )
        return dense(call, mask)
    q, k, v = call.packed(max(1, record.seen.end))
    made = plan_of(record, bounds.squeeze(1), describe(q, k, v), flex=flex)
    if isinstance(made, str):
        # transformers' flex_attention does not train wider heads on an H100 either: no configuration fits its memory.
        flex_trains = call.needs_grad and q.shape[-1] <= WIDEST_OF_FA4
        warn_once(no_kernel(made, flex_trains=flex_trains))
        return dense(call, *_without_a_kernel(record, call))
    out, _ = run(
        made, q, k, v, spec=made.spec, softmax_scale=call.scaling, softcap=call.softcap, learnable_sink=call.sink
    )
    return out, None


def no_kernel(why: str, *, flex_trains: bool = False) -> str:
    """What a user is told once. flex_trains: there are gradients, and transformers' flex_attention may have them."""
    hint = "; to train, compare attn_implementation='flex_attention'" if flex_trains else ""
    return f"fa4_prefixlm: SDPA (with softcap or sinks plain torch) runs some layers, exactly, not as fast: {why}{hint}"


def plan_of(record: Record, bounds: torch.Tensor, spec: CallSpec, *, flex: bool = False) -> Plan | str:
    """The plan of tensors like `spec` under the record's bounds `(batch, q, 2 * n)`; or why there is none.

    Made by the first layer that asks.

    flex: FlexAttention may run head dims that FA4 lacks.
    """
    made = record.plans.get((spec, flex))
    if made is None:
        made = record.plans[spec, flex] = _make_plan(record, bounds, spec, flex)
    return made


def _make_plan(record: Record, bounds: torch.Tensor, spec: CallSpec, flex: bool) -> Plan | str:
    seen, build = record.seen, locate.installed()
    assert seen is not None
    n = max(1, seen.intervals)
    lo, hi = bounds.chunk(2, dim=2)
    narrowed = torch.cat([lo.narrow(2, 0, n), hi.narrow(2, 0, n)], dim=2)
    reach = seen.longest if 2 * seen.longest < spec.shape_k[1] else None
    batch = BoundedBatch(spec, narrowed, seen.from_key_0, reach)
    if seen.causal and (spec.device.type != "cuda" or causal_refusal(spec, build) is None):
        plain = causal if seen.longest >= spec.shape_k[1] else causal & window(seen.longest)
        return plan_for(spec, BatchArguments(), plain, build)
    choice = batch.choose(build)
    if spec.device.type == "cuda" and choice.name in ("cudnn", "flex", "reference"):
        why = dict(choice.passed_over).get("varlen", choice.reason)  # the one that takes any bounds
        why = f"{why} (head dim {spec.head_dim}, {spec.dtype})"
        if choice.name != "flex" or not flex or spec.head_dim <= WIDEST_OF_FA4 or spec.dtype == torch.float32:
            return why
        warn_once(f"fa4_prefixlm: FlexAttention runs some layers, and is compiled at the first of them: {why}")
    return batch.plan(build, choice)


def _without_a_kernel(record: Record, call: Call) -> tuple[torch.Tensor | None, bool | None]:
    """(mask, is_causal) for SDPA."""
    seen = record.seen
    assert seen is not None
    # SDPA's own causal mask counts from the first key.
    whole = seen.longest >= call.key.shape[2] and call.query.shape[2] == call.key.shape[2]
    return (None, True) if seen.causal and whole else (record.as_dense(), None)


def _in_graph(call: Call, bounds: torch.Tensor) -> Output:
    """What `torch.compile` traces: an operation that makes the eager call; with gradients, SDPA."""
    if call.needs_grad:
        return dense(call, torch.ops.fa4_prefixlm.dense_mask(bounds, call.key.shape[2]))
    out = torch.ops.fa4_prefixlm.bounded_attention(
        *call.packed(),
        bounds,
        call.scaling,
        call.softcap,
        call.sink,
    )
    return out, None


def dense(call: Call, mask: torch.Tensor | None, is_causal: bool | None = None) -> Output:
    """SDPA, or the same in plain torch for what SDPA does not take."""
    is_causal = call.is_causal if is_causal is None else is_causal
    if call.softcap or call.sink is not None:
        return _plain(call, mask, is_causal), None
    return sdpa_attention_forward(
        call.module,
        call.query,
        call.key,
        call.value,
        mask,
        scaling=call.scaling,
        is_causal=is_causal,
        position_bias=call.rest.get("position_bias"),
    )


def _plain(call: Call, mask: torch.Tensor | None, is_causal: bool | None) -> torch.Tensor:
    """Attention with softcap and sinks; `(batch, q, heads, head_dim)`. Scores of a few queries, or of no kernel."""
    if call.rest.get("position_bias") is not None:
        raise UnsupportedError("position_bias", "None with softcap or sinks", "a tensor")
    query, key, value = call.query, call.key, call.value
    batch, heads, rows, _ = query.shape
    scale = call.scaling if call.scaling is not None else query.shape[3] ** -0.5
    grouped = query.reshape(batch, key.shape[1], -1, rows, query.shape[3]).float()
    scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped, key.float()) * scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if mask is None and rows > 1 and (is_causal if is_causal is not None else getattr(call.module, "is_causal", True)):
        mask = torch.ones(rows, key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None]
    if mask is not None:
        mask = mask.unsqueeze(2)  # the heads of a group are a dimension of their own
        mask = mask.unflatten(1, (key.shape[1], -1)).squeeze(3) if mask.shape[1] > 1 else mask
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(mask.logical_not(), least) if mask.dtype == torch.bool else scores + mask
    if call.sink is not None:
        sink = call.sink.float().view(1, key.shape[1], -1, 1, 1).expand(batch, -1, -1, rows, 1)
        scores = torch.cat([scores, sink], dim=4)
    weights = scores.softmax(4)[..., : key.shape[2]].to(value.dtype)
    out = torch.einsum("bhgqk,bhkd->bqhgd", weights, value)
    return out.reshape(batch, rows, heads, -1)


def _in_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype that autocast gives to every other product."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)
