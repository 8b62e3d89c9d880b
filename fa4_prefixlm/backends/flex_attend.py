"""The compiled function of `flex` and its backward: torch's FlexAttention over tables of ours, for any batch.

What changes from batch to batch is tensors: which block of keys a block of queries visits, and where the keys of a row
begin and end, or what the mask's own rule reads of each token (`flex_rule`). Tokens are padded to whole blocks and come
as (blocks, tokens of a block), so that the length is known to be a multiple of the block while the number of blocks is
free: one compiled form runs every length.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fa4_prefixlm.backends.flex_rule import Rule, Seen, by_rule
from fa4_prefixlm.geometry.tiles import power_of_two

BLOCK = 128
LEAST_INT32 = torch.iinfo(torch.int32).min

Pair = tuple[torch.Tensor, torch.Tensor]


class Tables(NamedTuple):
    """A mask over one padded sequence of `rows` blocks of queries and `keys` blocks of keys; int32 on the device.

    Row `i` sees key `j` where one of its intervals holds it, or where `row_tag[i] == key_tag[j]`. Where there is a
    rule, it does if the key is of its sequence and the rule says so.

    Attributes:
        ends: `(2 * K, rows, BLOCK)`, of each interval in turn where it begins and its width, both with the sign bit
            flipped, so that a single comparison tells (`_compared`). Where `Form.searched`, `(rows, BLOCK, n)`: where
            intervals begin and end, ascending, n a power of two above `2 * K`, the rest past every key. Where
            `Form.rule`, `(3 + n, rows, BLOCK)`: the keys of the row's sequence as one interval, up to its own where
            the rule is causal, then what `by_rule` takes of rows.
        row_tag, key_tag: `(rows, BLOCK)`, `(keys, BLOCK)`; None: no tags.
        counts, indices: of the partial blocks of keys, `(1, 1, rows)` and `(1, 1, rows, keys)`.
        full_counts, full_indices: of those that need no mask.
        row_counts, row_indices, full_row_counts, full_row_indices: of each block of keys the blocks of queries, for
            the backward; None without it.
        of_keys: `(n, keys, BLOCK)`, what `by_rule` takes of keys; None: nothing.
    """

    ends: torch.Tensor
    row_tag: torch.Tensor | None
    key_tag: torch.Tensor | None
    counts: torch.Tensor
    indices: torch.Tensor
    full_counts: torch.Tensor
    full_indices: torch.Tensor
    row_counts: torch.Tensor | None = None
    row_indices: torch.Tensor | None = None
    full_row_counts: torch.Tensor | None = None
    full_row_indices: torch.Tensor | None = None
    of_keys: torch.Tensor | None = None

    def nbytes(self) -> int:
        return sum(own.nbytes for own in self if own is not None)


@dataclass(frozen=True)
class Form:
    """What one compiled form is for; all else may change from call to call.

    Attributes:
        device: "cuda" or "cpu".
        arch: compute capability, 90; 0 on the CPU.
        dtype, heads, dims: of the tensors, `(query, key)` heads and `(query, value)` head dims.
        ends: of a row, in `Tables.ends`.
        searched: the ends are searched, not compared one by one.
        tagged: there are tags.
        softmax_scale, softcap: constants of the kernel.
        sink: there are sinks.
        with_grad: its result has a backward.
        rule: tells whether a row sees a key of its sequence; None: the ends tell.
    """

    device: str
    arch: int
    dtype: torch.dtype
    heads: tuple[int, int]
    dims: tuple[int, int]
    ends: int
    searched: bool
    tagged: bool
    softmax_scale: float
    softcap: float
    sink: bool
    with_grad: bool
    rule: Rule | None = None


# KiB a block of threads, of the architectures that have much of it.
SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
LEAST_SHARED_MEMORY = 99
# (BLOCK_M, BLOCK_N, stages), the fastest first.
FORWARD_BLOCKS = ((64, 32, 3), (64, 32, 2), (64, 32, 1), (32, 16, 2), (32, 16, 1), (16, 16, 1))


def blocks_that_fit(form: Form) -> dict[str, int]:
    """Options of torch's kernel: smaller blocks where those that it takes need more shared memory than the GPU has.

    Its choices fit head dims up to 256 on GPUs with much of it, and a mask that searches goes through it too.
    """
    if form.device == "cpu":
        return {}
    room, widest = 1024 * SHARED_MEMORY.get(form.arch, LEAST_SHARED_MEMORY), power_of_two(max(form.dims))
    row, little = widest * form.dtype.itemsize, form.arch not in SHARED_MEMORY
    options = {}
    if form.searched or widest > 256 or (little and row > 256):
        for block_m, block_n, stages in FORWARD_BLOCKS:
            # Queries, keys and values in flight, and what is searched.
            if row * (block_m + 2 * stages * block_n) + 8 * block_m * block_n * form.searched < 0.95 * room:
                options = {"fwd_BLOCK_M": block_m, "fwd_BLOCK_N": block_n, "fwd_num_stages": stages}
                if widest > 256 and block_m == FORWARD_BLOCKS[0][0]:
                    options["fwd_num_warps"] = 8  # with torch's four, the sums of so wide a row spill
                break
    if little and widest > 128:
        options |= dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32)
        options["bwd_num_stages"] = 1
    return options


_numbers = itertools.count()


@functools.lru_cache(maxsize=256)
def compiled(form: Form) -> Callable[..., Pair]:
    """`attend` for one form: `(q, k, v, sink, tables) -> (out, lse)`, compiled when it is first called.

    torch keeps a few compiled forms of one function and refuses more, and takes a number that differs from that of an
    earlier form for a variable; so each form gets a function with a name of its own. On the CPU it runs as torch's own
    dense form of FlexAttention: its compiled one has neither LSE nor free lengths there.
    """
    name = f"attend_{next(_numbers)}"
    own = types.FunctionType(attend.__code__.replace(co_name=name), attend.__globals__, name)
    run = torch.compile(own, backend="eager" if form.device == "cpu" else "inductor", fullgraph=True)
    return functools.partial(run, form, options=blocks_that_fit(form))


def free(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """The tensor, of which these sizes may differ from call to call."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


def attend(
    form: Form,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    tables: Tables,
    options: Any,
) -> Pair:
    """Attention of one padded sequence.

    Args:
        form: static.
        q: `(rows, BLOCK, heads, head_dim)`.
        k, v: `(keys, BLOCK, kv_heads, head_dim)` and `(keys, BLOCK, kv_heads, head_dim_v)`.
        sink: `(heads,)` or None.
        tables: the mask.
        options: `blocks_that_fit(form)`.

    Returns:
        `(out, lse)`: `(rows * BLOCK, heads, head_dim_v)`, and `(heads, rows * BLOCK)` in natural units.
    """
    q, k, v = (own.flatten(0, 1).transpose(0, 1).unsqueeze(0) for own in (q, k, v))
    seen = seen_by(form, tables)
    row_tag, key_tag = (None if tag is None else tag.flatten() for tag in (tables.row_tag, tables.key_tag))

    def mask_mod(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if row_tag is None or key_tag is None:
            return seen(row, key)
        return seen(row, key) | (row_tag[row] == key_tag[key])

    def score_mod(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return form.softcap * torch.tanh(score / form.softcap)

    out, aux = flex_attention(
        q,
        k,
        v,
        score_mod=score_mod if form.softcap else None,
        block_mask=BlockMask(
            seq_lengths=(q.shape[2], k.shape[2]),
            kv_num_blocks=tables.counts,
            kv_indices=tables.indices,
            full_kv_num_blocks=tables.full_counts,
            full_kv_indices=tables.full_indices,
            q_num_blocks=tables.row_counts,
            q_indices=tables.row_indices,
            full_q_num_blocks=tables.full_row_counts,
            full_q_indices=tables.full_row_indices,
            BLOCK_SIZE=(BLOCK, BLOCK),
            mask_mod=mask_mod,
        ),
        scale=form.softmax_scale,
        enable_gqa=True,
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    out, lse = out.squeeze(0).transpose(0, 1), aux.lse.squeeze(0)
    return (out, lse) if sink is None else with_sink(out, lse, sink)


def with_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> Pair:
    """Add to each row's softmax the sink, which has no value. A row that sees nothing stays 0, and its LSE is the sink.

    Args:
        out: `(rows, heads, head_dim_v)`.
        lse: `(heads, rows)`, without the sink.
        sink: `(heads,)`.
    """
    blind = lse == float("-inf")
    lse = lse.masked_fill(blind, 0.0)  # neither the value of such a row nor its gradient may be NaN, whatever the sink
    sink = sink.to(lse.dtype).unsqueeze(1)
    total = torch.logaddexp(lse, sink)
    share = torch.exp(lse - total)
    return (out * share.T.unsqueeze(2)).to(out.dtype), torch.where(blind, sink.expand_as(total), total)


def seen_by(form: Form, tables: Tables) -> Seen:
    """What the kernel asks: whether a row sees a key, beside tags. Both by their place in the padded batch."""
    if form.searched:
        return _searched(tables.ends, form.ends)
    edges = tables.ends.flatten(1).unbind(0)
    if form.rule is None:
        return _compared(edges)
    in_sequence = _compared(edges[:2])
    told = by_rule(form.rule, edges[2:], () if tables.of_keys is None else tables.of_keys.flatten(1).unbind(0))

    def seen(row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return in_sequence(row, key) & told(row, key)

    return seen


def _compared(edges: tuple[torch.Tensor, ...]) -> Seen:
    def seen(row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # As unsigned numbers, key - begin < width: in 32 bits it wraps around for keys before the interval.
        key = key.to(torch.int32)
        found = key - edges[0][row] < edges[1][row]
        for n in range(2, len(edges), 2):
            found = found | (key - edges[n][row] < edges[n + 1][row])
        return found

    return seen


def _searched(ends: torch.Tensor, count: int) -> Seen:
    edges = ends.flatten()

    def seen(row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        first = row * count
        before = key * 0  # how many ends are at most the key
        step = count // 2
        while step:
            before = torch.where(edges[first + before + (step - 1)] <= key, before + step, before)
            step //= 2
        return before % 2 == 1

    return seen
