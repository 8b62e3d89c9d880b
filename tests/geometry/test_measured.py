"""How many intervals rows really see: counted at the few rows that tell, against all of them."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.geometry.telling_rows import TellingRows, measured
from fa4_prefixlm.geometry.traits import MOST_INTERVALS, traits
from fa4_prefixlm.masks import causal, key_in, key_outside, one_block, prefix, query_in, same_span, window
from fa4_prefixlm.masks.atoms import KeyIn
from fa4_prefixlm.testing.batches import Batch, random_batch, random_spans
from fa4_prefixlm.testing.stages import prepare


def random_expression(rng: random.Random, depth: int = 3) -> fp.Mask:
    if depth and rng.random() < 0.8:
        left, right = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
        return left & right if rng.random() < 0.5 else left | right
    name, near = rng.choice(["a", "b"]), rng.randint(1, 80)
    return rng.choice(
        [
            *(causal, window(near), window(near, rng.randint(0, 40)), window(None, near), fp.PrefixLM(near)),
            *(same_span(name), same_span(name, before=near), prefix(name), key_in(name), key_outside(name)),
            *(query_in(name), one_block(name)),
        ]
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_rows_that_tell_are_enough(seed: int) -> None:
    rng = random.Random(seed)
    count = 0
    while count < 40:
        mask, batch = random_expression(rng), random_batch(rng, longest=400)
        spans = {name: tuple(random_spans(rng, keys) for _, keys in batch.seqlens) for name in mask.names}
        try:
            stage = prepare(batch, mask, spans)
        except fp.InputError:  # spans that the chunk would have to hold whole
            continue
        asked = traits(mask, stage.spans, stage.sizes)
        if asked.intervals <= MOST_INTERVALS:
            continue
        seen = int((stage.bounds.lo < stage.bounds.hi).sum(1).max())
        telling = TellingRows(mask, stage.spans, stage.sizes)
        few = telling.bounds
        assert seen == int((few.lo < few.hi).sum(1).max()), (mask, batch)
        # Beyond what kernels take, the formula's bound will do where one row has told that it is beyond.
        wanted = asked.intervals if telling.one_sees_more_than(MOST_INTERVALS) else max(1, seen)
        assert not any(telling.one_sees_more_than(most) for most in range(seen, seen + 9))
        assert measured(asked, telling) == dataclasses.replace(asked, intervals=wanted)
        count += 1


def test_a_row_that_sees_many_settles_it() -> None:
    """No other is looked at, and none where the formula's bound is low."""
    batch = Batch(((80, 80), (0, 90), (40, 120)), ((), (), ()))
    spans = {"image": [[(at, at + 2) for at in range(0, count, 4)] for count in (12, 90, 90)]}
    for mask in (causal & (window(3) | key_in("image")), key_outside("image")):
        stage = prepare(batch, mask, spans)
        asked, telling = traits(mask, stage.spans, stage.sizes), TellingRows(mask, stage.spans, stage.sizes)
        assert asked.intervals == 24
        assert all(telling.one_sees_more_than(most) for most in range(23))
        assert measured(asked, telling) == asked
        assert "bounds" not in vars(telling)
    mask = window(9, 0) & key_in("image")
    stage = prepare(batch, mask, spans)
    telling = TellingRows(mask, stage.spans, stage.sizes)
    assert not telling.one_sees_more_than(0)
    assert measured(traits(mask, stage.spans, stage.sizes), telling).intervals == 3
    assert "bounds" in vars(telling)


def test_few_rows_are_looked_at() -> None:
    spans = {"image": [[(at, at + 256) for at in range(0, 8192, 1024)]] * 2}
    cu = [0, 8192, 16384]
    q = torch.empty(16384, 1, 16)
    plan = fp.plan(
        spans, like=(q, q, q), cu_seqlens_q=cu, cu_seqlens_k=cu, mask=causal & (window(1024) | key_in("image"))
    )
    rows = TellingRows(plan.mask, plan.spans, plan.lengths).where
    assert 0 < len(rows.position) < 500


class Odd(KeyIn):
    """Says anew what its rows see, and not where its intervals end."""

    def intervals(self, rows):  # type: ignore[no-untyped-def]
        lo, hi = super().intervals(rows)
        return lo, hi.where(rows.position.unsqueeze(1) % 7 == 3, 0)


def test_a_subclass_that_does_not_say_where_intervals_end_is_counted_at_all_rows() -> None:
    batch = random_batch(random.Random(3), longest=400)
    stage = prepare(batch, causal & Odd("a"), {"a": tuple(((0, 3),) for _ in batch.seqlens)})
    telling = TellingRows(causal & Odd("a"), stage.spans, stage.sizes)
    assert len(telling.where.position) == stage.sizes.total_q
    assert telling.pieces(9) is None
