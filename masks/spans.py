"""Spans from what a processor writes: per sequence a list of half-open `(start, end)`, as `plan` takes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from fa4_prefixlm.errors import InputError

BatchSpans = list[list[tuple[int, int]]]


def runs_of(
    token_types: torch.Tensor, values: Collection[int], *, merge: bool = True, joined: bool = False
) -> BatchSpans:
    """The maximal runs of tokens whose type is one of `values`.

    `[0, 1, 1, 2, 0, 1]` with values {1, 2} gives `[(1, 4), (5, 6)]`; with `merge=False` `[(1, 3), (3, 4), (5, 6)]`.

    Args:
        token_types: `(batch, seqlen)`, any integer or boolean dtype (so also an attention mask), on any device. Its
            values are read on the host: a tensor on a GPU is copied, which waits for the device. Make the spans once
            for a batch, not once for a layer.
        values: the token types that are in a span.
        merge: runs of different values that touch are one span; False: each is its own. Two spans of one value that
            touch are read as one run: give such spans to `plan` by hand.
        joined: the tokens of a row must be one run, or none. For models in which these tokens all see each other,
            wherever they are: with a single run `same_span` is the same mask as `one_block` and costs less.

    Returns:
        Per sequence a list of half-open `(start, end)`, ascending.

    Raises:
        InputError: `joined`, and a row has more than one run.
    """
    _check(token_types, values)
    rows: list[list[int]] = token_types.tolist()
    wanted = {int(value): int(value) if not merge else 0 for value in values}
    result = [_runs([wanted.get(kind) for kind in row]) for row in rows]
    for index, spans in enumerate(result):
        if joined and len(spans) > 1:
            raise InputError(f"token_types[{index}]", f"one run of the types {sorted(wanted)}", f"the runs {spans}")
    return result


def drop_longer(spans: Sequence[Sequence[tuple[int, int]]], window: int) -> BatchSpans:
    """The spans of at most `window` tokens. Longer ones are left out, so their tokens are causal.

    vLLM 0.33.0 does this with the images of Gemma 3 and PaliGemma 2, on all layers (`compute_mm_prefix_ranges` in
    `v1/attention/backends/utils.py`). For Gemma 4 it drops none, and transformers drops none for any model.

    Args:
        spans: per sequence, half-open `(start, end)`.
        window: sliding window in tokens.
    """
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise InputError("window", "a positive number of tokens", window)
    return [[(start, end) for start, end in own if end - start <= window] for own in spans]


def _check(token_types: torch.Tensor, values: Collection[int]) -> None:
    if not isinstance(token_types, torch.Tensor):
        raise InputError("token_types", "an integer tensor (batch, seqlen)", type(token_types).__name__)
    kind = token_types.dtype
    if kind.is_floating_point or kind.is_complex:
        raise InputError("token_types", "an integer or boolean dtype", kind)
    if token_types.ndim != 2:
        raise InputError("token_types", "shape (batch, seqlen)", tuple(token_types.shape))
    if not isinstance(values, Collection) or isinstance(values, str):
        raise InputError("values", "a collection of token types, such as {1}", repr(values))
    if len(values) == 0:
        raise InputError("values", "at least one token type", values)


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
