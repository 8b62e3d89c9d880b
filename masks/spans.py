"""Spans from what a processor writes, as `plan` takes them: half-open `(start, end)` per sequence.

`runs_of` reads token types on the host and gives lists; `runs_on_device` leaves them on the device and gives a tensor.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Sequence

import torch

from fa4_prefixlm.batch.integers import as_int32, true_or_false, whole_number
from fa4_prefixlm.batch.lengths import CuSeqlens
from fa4_prefixlm.batch.ranges import check_pairs
from fa4_prefixlm.device_checks import assert_on_device, to_device
from fa4_prefixlm.errors import InputError

BatchSpans = list[list[tuple[int, int]]]


def runs_of(
    token_types: torch.Tensor,
    values: Collection[int],
    *,
    merge: bool = True,
    joined: bool = False,
    cu_seqlens: CuSeqlens | None = None,
) -> BatchSpans:
    """The maximal runs of tokens whose type is one of `values`.

    `[0, 1, 1, 2, 0, 1]` with values {1, 2} gives `[(1, 4), (5, 6)]`; with `merge=False` `[(1, 3), (3, 4), (5, 6)]`.

    Args:
        token_types: `(batch, seqlen)`, or packed `(total,)` with `cu_seqlens`; any integer or boolean dtype (so also an
            attention mask), on any device. Its values are read on the host: a tensor on a GPU is copied, which waits
            for the device (`runs_on_device` does not). Make the spans once for a batch, not once for a layer.
        values: the token types that are in a span.
        merge: runs of different values that touch are one span; False: each is its own. Two spans of one value that
            touch are read as one run: give such spans to `plan` by hand.
        joined: the tokens of a row must be one run, or none. For models in which these tokens all see each other,
            wherever they are: with a single run `same_span` is the same mask as `one_block` and costs less.
        cu_seqlens: `(batch + 1,)` int32, where the sequences of packed token types begin and end. A run ends with its
            sequence, and counts from its start. Tokens past `cu_seqlens[-1]` are of no sequence.

    Returns:
        per sequence a list of half-open `(start, end)`, ascending, in tokens from its start.

    Raises:
        InputError: an argument is not as above; or `joined`, and a row has more than one run.
    """
    types = _checked(token_types, values, packed=cu_seqlens is not None)
    merge, joined = true_or_false("merge", merge), true_or_false("joined", joined)
    rows = _rows(token_types, cu_seqlens)
    wanted = {value: 0 if merge else value for value in types}
    result = [_runs([wanted.get(kind) for kind in row]) for row in rows]
    for index, spans in enumerate(result):
        if joined and len(spans) > 1:
            raise InputError(f"token_types[{index}]", f"one run of the types {sorted(wanted)}", f"the runs {spans}")
    return result


def runs_on_device(
    token_types: torch.Tensor,
    values: Collection[int],
    *,
    max_spans: int,
    merge: bool = True,
    cu_seqlens: CuSeqlens | None = None,
) -> torch.Tensor:
    """The runs of `runs_of` as a tensor on the device of the token types, without waiting for it.

    Args:
        token_types: `(batch, seqlen)`, or packed `(total,)` with `cu_seqlens`; any integer or boolean dtype.
        values, merge: as for `runs_of`.
        max_spans: runs of a sequence, at most; the width of the result, which the values can't decide here. A sequence
            with more fails a device-side assertion (on the CPU, an `InputError`).
        cu_seqlens: `(batch + 1,)` int32 on the host or the device of the token types, as for `runs_of`.

    Returns:
        `(batch, max_spans, 2)` int32, half-open `[start, end)` in positions of the sequence, ascending, unused rows
        `(0, 0)`: ranges as `plan` and `ServingPlan.update` take them.

    Raises:
        InputError: an argument is wrong; nothing was launched.
    """
    wanted = _checked(token_types, values, packed=cu_seqlens is not None)
    merge = true_or_false("merge", merge)
    max_spans = whole_number("max_spans", max_spans, "a positive number of spans", least=1)
    device, types = token_types.device, token_types.flatten()
    begins = _begins(token_types, cu_seqlens)
    batch = len(begins) - 1
    token = torch.arange(len(types), device=device, dtype=torch.int32)
    sequence = torch.searchsorted(begins.narrow(0, 1, batch), token, right=True)  # `batch` is no sequence
    is_start, is_end = _edges(_groups(types, wanted, merge).masked_fill(sequence == batch, -1), sequence)
    starts = torch.nn.functional.pad(is_start.cumsum(0), (1, 0))  # runs that began before each token
    nth = starts.narrow(0, 1, len(types)) - 1 - starts.take(begins.long().clamp(0, len(types))).take(sequence)
    fits = nth < max_spans
    _require_room(fits | is_start.logical_not(), nth, max_spans)
    local, unused = token - begins.take(sequence), batch * max_spans * 2
    # One place more than the result has, for what is no edge of a run.
    edges = torch.zeros(unused + 1, dtype=torch.int32, device=device)
    place = (sequence * max_spans + nth) * 2
    edges.scatter_(0, torch.where(is_start & fits, place, unused), local)
    edges.scatter_(0, torch.where(is_end & fits, place + 1, unused), local + 1)
    return edges.narrow(0, 0, unused).view(batch, max_spans, 2)


def read_spans(
    token_types: torch.Tensor,
    values: Collection[int],
    *,
    cu_seqlens: CuSeqlens | None,
    max_spans: int | None,
    joined: bool = False,
) -> BatchSpans | torch.Tensor:
    """`runs_on_device` with `max_spans`, else `runs_of`: what the `spans_from_token_types` of the models share."""
    if max_spans is None:
        return runs_of(token_types, values, joined=joined, cu_seqlens=cu_seqlens)
    return runs_on_device(token_types, values, max_spans=1 if joined else max_spans, cu_seqlens=cu_seqlens)


def drop_longer(spans: Sequence[Sequence[tuple[int, int]]], window: int) -> BatchSpans:
    """The spans of at most `window` tokens. Longer ones are left out, so their tokens are causal.

    vLLM 0.33.0 does this with the images of Gemma 3 and PaliGemma 2, on all layers (`compute_mm_prefix_ranges` in
    `v1/attention/backends/utils.py`). For Gemma 4 it drops none, and transformers drops none for any model.

    Args:
        spans: per sequence, half-open `(start, end)`; or an integer tensor `(batch, max_spans, 2)` with unused rows
            `(0, 0)`, which is read on the host.
        window: sliding window in tokens.

    Returns:
        those that are left, per sequence a list of half-open `(start, end)`, in the order given.

    Raises:
        InputError: `spans` are not such pairs with `0 <= start < end`, or `window` is no positive number of tokens.
    """
    window = whole_number("window", window, "a positive number of tokens", least=1)
    if not isinstance(spans, (Sequence, torch.Tensor)) or isinstance(spans, (str, bytes)) or _is_scalar(spans):
        raise InputError("spans", "a list of spans per sequence", f"{spans!r} ({type(spans).__name__})")
    checked = [check_pairs(f"spans[{index}]", own) for index, own in enumerate(spans)]
    return [[(start, end) for start, end in own if end - start <= window] for own in checked]


def without_padding(token_types: torch.Tensor, attention_mask: torch.Tensor, *, packed: bool) -> torch.Tensor:
    """The token types with -1 where `attention_mask`, of the same shape, is 0."""
    _check(token_types, packed=packed)
    if not isinstance(attention_mask, torch.Tensor):
        raise InputError("attention_mask", "a tensor of the shape of token_types", type(attention_mask).__name__)
    if attention_mask.shape != token_types.shape:
        raise InputError("attention_mask", f"shape {tuple(token_types.shape)}", tuple(attention_mask.shape))
    return token_types.masked_fill(attention_mask == 0, -1)


def _is_scalar(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0


def _checked(token_types: torch.Tensor, values: Collection[int], *, packed: bool) -> list[int]:
    """The values as Python integers."""
    _check(token_types, packed=packed)
    if not isinstance(values, Collection) or isinstance(values, (str, bytes)) or _is_scalar(values):
        raise InputError("values", "a collection of token types, such as {1}", f"{values!r} ({type(values).__name__})")
    if len(values) == 0:
        raise InputError("values", "at least one token type", values)
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise InputError("values", "integers, the token types", values) from None


def _check(token_types: torch.Tensor, *, packed: bool) -> None:
    if not isinstance(token_types, torch.Tensor):
        raise InputError("token_types", "an integer tensor (batch, seqlen)", type(token_types).__name__)
    kind = token_types.dtype
    if kind.is_floating_point or kind.is_complex:
        raise InputError("token_types", "an integer or boolean dtype", kind)
    if token_types.ndim != (1 if packed else 2):
        expected = "shape (total,) with cu_seqlens" if packed else "shape (batch, seqlen), or (total,) with cu_seqlens"
        raise InputError("token_types", expected, tuple(token_types.shape))


def _packed_lengths(cu_seqlens: CuSeqlens, token_types: torch.Tensor) -> CuSeqlens:
    """`cu_seqlens`, checked as far as that needs no value of a device."""
    device = token_types.device
    cu_seqlens = as_int32("cu_seqlens", cu_seqlens)
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
            raise InputError("cu_seqlens", "shape (batch + 1,)", tuple(cu_seqlens.shape))
        if cu_seqlens.device.type != "cpu":
            if cu_seqlens.device != device:
                raise InputError("cu_seqlens", f"a tensor on the CPU or on {device}", cu_seqlens.device)
            return cu_seqlens
        cu_seqlens = cu_seqlens.tolist()
    if not isinstance(cu_seqlens, Sequence) or len(cu_seqlens) == 0:
        raise InputError("cu_seqlens", "an int32 tensor or a list of batch + 1 integers", cu_seqlens)
    known = [whole_number(f"cu_seqlens[{index}]", own, "a number of tokens") for index, own in enumerate(cu_seqlens)]
    if known[0] != 0 or any(after < before for before, after in itertools.pairwise(known)):
        raise InputError("cu_seqlens", "values that ascend from 0", known)
    _check_last(known[-1], token_types)
    return known


def _check_last(last: int, token_types: torch.Tensor) -> None:
    if last > len(token_types):
        raise InputError("cu_seqlens[-1]", f"at most the {len(token_types)} tokens of token_types", last)


def _rows(token_types: torch.Tensor, cu_seqlens: CuSeqlens | None) -> list[list[int]]:
    """The token types of each sequence, on the host."""
    if cu_seqlens is None:
        return token_types.tolist()
    begins = _packed_lengths(cu_seqlens, token_types)
    begins = begins.tolist() if isinstance(begins, torch.Tensor) else begins
    _check_last(begins[-1], token_types)
    types = token_types.tolist()
    return [types[begin:end] for begin, end in itertools.pairwise(begins)]


def _begins(token_types: torch.Tensor, cu_seqlens: CuSeqlens | None) -> torch.Tensor:
    """`(batch + 1,)` int32 on the device of the token types: where sequences begin, and the last one ends."""
    if cu_seqlens is not None:
        return to_device(_packed_lengths(cu_seqlens, token_types), token_types.device)
    batch, seqlen = token_types.shape
    return torch.arange(batch + 1, device=token_types.device, dtype=torch.int32) * seqlen


def _groups(types: torch.Tensor, values: Collection[int], merge: bool) -> torch.Tensor:
    """Which group each token is of, -1 for none; tokens of one group that touch are one run."""
    group = torch.full_like(types, -1, dtype=torch.int32)
    for index, value in enumerate(values):
        group = group.masked_fill(types == value, 0 if merge else index)
    return group


def _edges(group: torch.Tensor, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether a run begins at each token, whether one ends with it)."""
    tokens = len(group)
    changes = (group.diff() != 0) | (sequence.diff() != 0)
    first, last = (torch.nn.functional.pad(changes, side, value=True) for side in ((1, 0), (0, 1)))
    return first.narrow(0, 0, tokens) & (group >= 0), last.narrow(0, 0, tokens) & (group >= 0)


def _require_room(fine: torch.Tensor, nth: torch.Tensor, max_spans: int) -> None:
    """Refuse more runs than `max_spans`; on a GPU by an assertion that does not synchronise."""
    if fine.device.type != "cpu":
        assert_on_device(fine.all(), "token_types: a sequence has more runs than max_spans")
    elif not fine.all():
        most = int(nth.masked_fill(fine, 0).max()) + 1
        raise InputError("token_types", f"at most max_spans = {max_spans} runs in a sequence", most)


def _runs(groups: Sequence[int | None]) -> list[tuple[int, int]]:
    """Maximal runs of one group; None is in no run."""
    spans: list[tuple[int, int]] = []
    start = 0
    for index in range(1, len(groups) + 1):
        if index == len(groups) or groups[index] != groups[start]:
            if groups[start] is not None:
                spans.append((start, index))
            start = index
    return spans
