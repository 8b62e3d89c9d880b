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
from fa4_prefixlm.masks.closed_form import ClosedForm, Edges, Inside, closed_form
from fa4_prefixlm.masks.protocols import Pairs
from fa4_prefixlm.testing.batches import random_spans
from fa4_prefixlm.testing.empty_rows import Blind

ATOMS = (causal, window(4), same_span("image"), query_in("image"))
BOTH_SIDES = (causal, window(4, 3), window(None, 3), everything, same_span("image"), query_in("image"))
KEYS = 14
TO_ROW, NEAR = Edges("keys", "row"), Edges("window", "row")
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


Spans = tuple[tuple[int, int], ...]


def dense_of(form: ClosedForm, seqlen_q: int, seqlen: int, spans: dict[str, Spans]) -> torch.Tensor:
    result = torch.zeros(seqlen_q, seqlen, dtype=torch.bool)
    for row in range(seqlen_q):
        position = row + seqlen - seqlen_q
        holding = {name: (start, end) for name, own in spans.items() for start, end in own if start <= position < end}
        lo, hi = form.interval(position, seqlen, holding)
        result[row, lo:hi] = True
    return result


def check(mask: Mask, seqlen_q: int, seqlen: int, *spans: Spans) -> None:
    """spans: of the sets that the mask reads, by name; more are left alone."""
    form = closed_form(mask)
    assert form is not None
    named = dict(zip(sorted(mask.names), spans, strict=False))
    assert [own.span for own in form.inside] == list(named)
    wanted = mask.dense(seqlen=seqlen, ranges=named, seqlen_q=seqlen_q)
    assert torch.equal(dense_of(form, seqlen_q, seqlen, named), wanted), (mask, spans)
    if form.is_causal_outside:
        assert not mask.dense(seqlen=seqlen, seqlen_q=seqlen, ranges=dict.fromkeys(named, ())).triu(1).any()


def test_every_expression_has_a_form_that_says_the_same_or_blind_rows() -> None:
    forms = check_all(expressions(3))
    assert {edges.begin for edges in seen_in(forms)} == {"keys", "window", "window or span"}
    assert {edges.end for edges in seen_in(forms)} == {"row", "span", "keys"}


@pytest.mark.slow
def test_every_expression_of_windows_that_look_right() -> None:
    forms = check_all(expressions(3, BOTH_SIDES))
    assert {edges.begin for edges in seen_in(forms)} == {"keys", "window", "window or span"}
    ends = {"row", "window and span", "window", "span", "window or span", "keys"}
    assert {edges.end for edges in seen_in(forms)} == ends


@pytest.mark.slow
def test_every_expression_of_two_sets() -> None:
    """The sets joined by `|`, one of them moved to the left; rows in spans of both."""
    masks = expressions(3, (causal, window(4, 3), same_span("image"), same_span("canvas", before=3)))
    forms = check_all([mask for mask in masks if closed_form(mask) is not None])
    assert sum(len(form.inside) == 2 for form in forms) > 10
    assert {own.before for form in forms for own in form.inside} == {0, 3}


def seen_in(forms: set[ClosedForm]) -> list[Edges]:
    return [own.edges for form in forms for own in form.inside]


def check_all(masks: list[Mask]) -> set[ClosedForm]:
    rng, forms = random.Random(0), set()
    for index, mask in enumerate(masks):
        form = closed_form(mask)
        if form is None:
            assert not mask.dense(seqlen=1).any(), f"{mask} has no form, but no blind row outside of spans"
            continue
        forms.add(form)
        seqlen_q = rng.choice([KEYS, 1, 9])
        check(mask, KEYS, KEYS, SPANS[index % len(SPANS)], random_spans(rng, KEYS))
        check(mask, seqlen_q, KEYS, random_spans(rng, KEYS), random_spans(rng, KEYS))
    assert len(masks) > 200
    return forms


@pytest.mark.parametrize("spans", SPANS, ids=str)
@pytest.mark.parametrize("tokens", [None, 1, 4, 20])
def test_prefix_lm(tokens: int | None, spans: tuple[tuple[int, int], ...]) -> None:
    for clamp, seqlen_q in itertools.product((True, False), (1, 5, KEYS)):
        check(PrefixLM(tokens, clamp=clamp), seqlen_q, KEYS, spans)


@pytest.mark.parametrize(
    ("mask", "form"),
    [
        (PrefixLM(), ClosedForm(TO_ROW, (Inside("image", Edges("keys", "span")),))),
        (PrefixLM(4), ClosedForm(NEAR, (Inside("image", Edges("window", "span")),), 4)),
        (PrefixLM(4, clamp=False), ClosedForm(NEAR, (Inside("image", Edges("window or span", "span")),), 4)),
        (causal, ClosedForm(TO_ROW)),
        (window(3), ClosedForm(Edges("window", "keys"), (), 3)),
        (window(3) & causal | query_in("a"), ClosedForm(NEAR, (Inside("a", Edges("keys", "keys")),), 3)),
        (window(3, 0), ClosedForm(NEAR, (), 3)),
        (window(3, 2), ClosedForm(Edges("window", "window"), (), 3, 2)),
        (window(None, 2), ClosedForm(Edges("keys", "window"), (), None, 2)),
        (everything, ClosedForm(Edges("keys", "keys"))),
        (
            window(3) & window(None, 2) | same_span("a"),
            ClosedForm(Edges("window", "window"), (Inside("a", Edges("window or span", "window or span")),), 3, 2),
        ),
        (
            causal | same_span("a") & window(3, 2),
            ClosedForm(TO_ROW, (Inside("a", Edges("keys", "window and span")),), 3, 2),
        ),
        (
            causal & window(3) | same_span("b") | same_span("a", before=2),
            ClosedForm(
                NEAR,
                (Inside("a", Edges("window or span", "span"), 2), Inside("b", Edges("window or span", "span"))),
                3,
            ),
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
        causal | same_span("image") | same_span("image", before=2),
        causal | same_span("image") & same_span("video"),
        (causal | same_span("image")) & (causal | same_span("video")),
        causal | same_span("image") | same_span("video") | same_span("audio"),
        same_span("image"),
        same_span("image", before=2),
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
