"""A mask in few parts against its own intervals, row by row, and what has none."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

import fa4_prefixlm as fp
from fa4_prefixlm.masks import block_diffusion, causal, key_in, key_outside, one_block, query_in, same_span, window
from fa4_prefixlm.masks.atoms import KeyIn
from fa4_prefixlm.masks.plain_parts import MOST_PARTS, MOST_TERMS, Kind, Part, few_parts, in_plain_parts
from fa4_prefixlm.testing.batches import random_batch, random_spans
from fa4_prefixlm.testing.stages import prepare
from tests.geometry.test_measured import random_expression


@pytest.mark.parametrize("seed", range(10))
def test_rows_see_what_the_mask_says(seed: int) -> None:
    rng, count = random.Random(seed), 0
    while count < 10:
        mask, batch = random_expression(rng), random_batch(rng, longest=90)
        spans = {name: tuple(random_spans(rng, keys) for _, keys in batch.seqlens) for name in mask.names}
        parts = few_parts(mask)
        try:
            stage = prepare(batch, mask, spans)
        except fp.InputError:  # spans that the chunk would have to hold whole
            continue
        if parts is None or stage.bounds.tags is not None:
            continue
        where, bounds = stage.where, stage.bounds
        for row, (lo, hi) in enumerate(zip(bounds.lo.tolist(), bounds.hi.tolist(), strict=True)):
            own = {name: tuple(sorted(sets[int(where.sequence[row])])) for name, sets in spans.items()}
            seen = parts.seen(int(where.position[row]), int(where.seqlen_k[row]), own)
            assert seen == [pair for pair in zip(lo, hi, strict=True) if pair[0] < pair[1]], mask
        count += 1


def test_an_or_of_ands() -> None:
    parts = few_parts(causal & (window(4) | key_in("image")))
    assert parts is not None
    assert parts.parts == (
        Part(Kind.WINDOW, "", 3),
        Part(Kind.WINDOW, right=0),
        Part(Kind.KEY_IN, "image"),
    )
    assert parts.terms == ((0, 1), (1, 2))
    assert few_parts(causal | one_block("image") & causal) == few_parts(causal)  # a term that holds all of another
    both = few_parts(same_span("z") & key_outside("m") | key_in("a") & query_in("b"))
    assert both is not None
    assert (both.names, both.key_sets) == (("a", "m", "b", "z"), 2)


@dataclass(frozen=True, repr=False)
class Odd(KeyIn):
    """It may say anything."""


def test_what_has_no_few_parts() -> None:
    for mask in (Odd("a"), causal & Odd("a"), block_diffusion(4) & causal):
        assert in_plain_parts(mask) is None
        assert few_parts(mask) is None
    every = window(1)
    for left in range(2, MOST_PARTS + 1):
        every = every & window(left)
    assert few_parts(every) is not None
    assert few_parts(every & causal) is None
    either = [causal & (window(n) | same_span(name)) for n, name in enumerate("abcd", start=1)]
    assert few_parts(either[0] & either[1] & either[2] & either[3]) is not None
    assert MOST_TERMS == 2**4
    assert few_parts(either[0] & either[1] & either[2] & either[3] & (key_in("a") | query_in("a"))) is None
    assert few_parts(key_in("a") | key_in("b") | key_in("c") | key_in("d") | key_in("e")) is None
