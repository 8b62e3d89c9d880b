"""The closed form against the dense mask, for every expression up to a depth and for what has no form."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from fa4_prefixlm import Mask, PrefixLM
from fa4_prefixlm.masks import (
    causal,
    everything,
    from_cute,
    from_flex,
    key_in,
    one_block,
    prefix,
    query_in,
    same_span,
    window,
)
from fa4_prefixlm.masks.closed_form import ClosedForm, Edges, closed_form
from fa4_prefixlm.masks.protocols import Pairs
from fa4_prefixlm.testing.batches import random_spans
from fa4_prefixlm.testing.empty_rows import Blind

ATOMS = (causal, window(4), same_span("image"), query_in("image"))
BOTH_SIDES = (causal, window(4, 3), window(None, 3), everything, same_span("image"), query_in("image"))
KEYS = 14
# One token, the whole sequence, borders, adjacent spans, spans longer and shorter than the window.
SPANS = (
    (),
    ((0, 1), (6, 7), (13, 14)),
    ((0, KEYS),),
    ((0, 6), (6, 8), (12, 14)),
    ((2, 11),),
    ((1, 4), (4, 5), (5, 13)),
)


def expressions(depth: int, atoms: tuple[Mask, ...] = ATOMS) -> list[Mask]:
    if depth == 1:
        return list(atoms)
    parts = expressions(depth - 1, atoms)
    pairs = list(itertools.combinations_with_replacement(parts, 2))
    return parts + [a & b for a, b in pairs] + [a | b for a, b in pairs]


def dense_of(form: ClosedForm, seqlen_q: int, seqlen: int, spans: tuple[tuple[int, int], ...]) -> torch.Tensor:
    result = torch.zeros(seqlen_q, seqlen, dtype=torch.bool)
    for row in range(seqlen_q):
        position = row + seqlen - seqlen_q
        span = next(((start, end) for start, end in spans if start <= position < end), None)
        lo, hi = form.interval(position, seqlen, span)
        result[row, lo:hi] = True
    return result


def check(mask: Mask, seqlen_q: int, seqlen: int, spans: tuple[tuple[int, int], ...]) -> None:
    form = closed_form(mask)
    assert form is not None
    wanted = mask.dense(seqlen=seqlen, ranges=spans if mask.names else None, seqlen_q=seqlen_q)
    assert torch.equal(dense_of(form, seqlen_q, seqlen, spans if form.span else ()), wanted), (mask, spans)
    if form.is_causal_outside:
        assert not mask.dense(seqlen=seqlen, seqlen_q=seqlen).triu(1).any()


def test_every_expression_has_a_form_that_says_the_same_or_blind_rows() -> None:
    forms = check_all(expressions(3))
    assert {form.inside.begin for form in forms} == {"keys", "window", "window or span"}
    assert {form.inside.end for form in forms} == {"row", "span", "keys"}


@pytest.mark.slow
def test_every_expression_of_windows_that_look_right() -> None:
    forms = check_all(expressions(3, BOTH_SIDES))
    assert {form.inside.begin for form in forms} == {"keys", "window", "window or span"}
    ends = {"row", "window and span", "window", "span", "window or span", "keys"}
    assert {form.inside.end for form in forms} == ends


def check_all(masks: list[Mask]) -> set[ClosedForm]:
    rng, forms = random.Random(0), set()
    for index, mask in enumerate(masks):
        form = closed_form(mask)
        if form is None:
            assert not mask.dense(seqlen=1).any(), f"{mask} has no form, but no blind row outside of spans"
            continue
        forms.add(form)
        seqlen_q = rng.choice([KEYS, 1, 9])
        check(mask, KEYS, KEYS, SPANS[index % len(SPANS)])
        check(mask, seqlen_q, KEYS, random_spans(rng, KEYS))
    assert len(masks) > 600
    return forms


@pytest.mark.parametrize("spans", SPANS, ids=str)
@pytest.mark.parametrize("tokens", [None, 1, 4, 20])
def test_prefix_lm(tokens: int | None, spans: tuple[tuple[int, int], ...]) -> None:
    for clamp, seqlen_q in itertools.product((True, False), (1, 5, KEYS)):
        check(PrefixLM(tokens, clamp=clamp), seqlen_q, KEYS, spans)


@pytest.mark.parametrize(
    ("mask", "form"),
    [
        (PrefixLM(), ClosedForm("image", None, Edges("keys", "row"), Edges("keys", "span"))),
        (PrefixLM(4), ClosedForm("image", 4, Edges("window", "row"), Edges("window", "span"))),
        (PrefixLM(4, clamp=False), ClosedForm("image", 4, Edges("window", "row"), Edges("window or span", "span"))),
        (causal, ClosedForm(None, None, Edges("keys", "row"), Edges("keys", "row"))),
        (window(3), ClosedForm(None, 3, Edges("window", "keys"), Edges("window", "keys"))),
        (window(3) & causal | query_in("a"), ClosedForm("a", 3, Edges("window", "row"), Edges("keys", "keys"))),
        (window(3, 0), ClosedForm(None, 3, Edges("window", "row"), Edges("window", "row"))),
        (window(3, 2), ClosedForm(None, 3, Edges("window", "window"), Edges("window", "window"), 2)),
        (window(None, 2), ClosedForm(None, None, Edges("keys", "window"), Edges("keys", "window"), 2)),
        (everything, ClosedForm(None, None, Edges("keys", "keys"), Edges("keys", "keys"))),
        (
            window(3) & window(None, 2) | same_span("a"),
            ClosedForm("a", 3, Edges("window", "window"), Edges("window or span", "window or span"), 2),
        ),
        (
            causal | same_span("a") & window(3, 2),
            ClosedForm("a", 3, Edges("keys", "row"), Edges("keys", "window and span"), 2),
        ),
    ],
    ids=str,
)
def test_the_form_of_known_masks(mask: Mask, form: ClosedForm) -> None:
    assert closed_form(mask) == form
    assert form.is_causal_outside == (form.outside.end == "row")


def visible(b, h, q, kv):
    return q >= kv


class Mine(PrefixLM):
    """The same mask in words of its own, so that the library can't know."""

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return super().visible(pairs)


@pytest.mark.parametrize(
    "mask",
    [
        prefix("image"),
        key_in("image"),
        one_block("image"),
        causal | prefix("image"),
        causal | one_block("image"),
        causal & window(4) | same_span("image") & window(5),
        window(4, 3) | same_span("image") & window(4, 5),
        causal | same_span("image") | same_span("video"),
        same_span("image"),
        query_in("image") & causal,
        Blind(4),
        Mine(4),
        causal | Mine(),
        from_flex(visible),
        from_flex(visible) & window(4),
        from_cute(visible, twin=visible),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_masks_without_a_form(mask: Mask) -> None:
    assert closed_form(mask) is None
