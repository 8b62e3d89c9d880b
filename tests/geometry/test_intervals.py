"""Bounds and the reference's dense mask against a double loop in plain Python, and against FlexAttention's algebra."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex

from fa4_prefixlm import PrefixLM
from fa4_prefixlm.batch import ranges
from fa4_prefixlm.geometry import intervals
from fa4_prefixlm.masks.dense import dense_mask
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO
from fa4_prefixlm.testing.batches import UGLY, Batch, brute_mask, masks_for, random_batch, random_mask
from fa4_prefixlm.testing.stages import dense, prepare


def check(batch: Batch, mask: PrefixLM) -> None:
    stage = prepare(batch, mask)
    for index, (rows, keys) in enumerate(batch.seqlens):
        here = slice(batch.cu_q[index], batch.cu_q[index] + rows)
        wanted = brute_mask(mask, rows, keys, batch.spans[index])
        assert torch.equal(dense(stage.bounds, keys, here), wanted)
        assert torch.equal(dense_mask(mask, rows, keys, {"image": batch.spans[index]}), wanted)
    assert int(stage.bounds.visible_pairs(stage.where)) == sum(
        int(brute_mask(mask, rows, keys, own).sum())
        for (rows, keys), own in zip(batch.seqlens, batch.spans, strict=True)
    )


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_batches(seed: int) -> None:
    rng = random.Random(seed)
    check(random_batch(rng, longest=60), random_mask(rng))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in UGLY if UGLY[name].cu_k[-1] < 400])
def test_ugly_batches(name: str) -> None:
    for mask in masks_for(UGLY[name]):
        check(UGLY[name], mask)


def test_the_worked_example_of_the_docstring() -> None:
    batch = Batch(((10, 10),), (((2, 8),),))
    for clamp, expected in ((True, (4, 8)), (False, (2, 8))):
        bounds = prepare(batch, PrefixLM(4, clamp=clamp)).bounds
        assert (int(bounds.lo[7, 0]), int(bounds.hi[7, 0])) == expected


def test_adjacent_spans_stay_two_spans() -> None:
    bounds = prepare(Batch(((8, 8),), (((0, 4), (4, 8)),)), PrefixLM()).bounds
    assert bounds.hi[:, 0].tolist() == [4, 4, 4, 4, 8, 8, 8, 8]


def test_unused_rows_do_not_hide_a_span_at_zero() -> None:
    batch = Batch(((6, 6), (6, 6)), (((0, 3),), ((0, 6),)))
    stage = prepare(batch, PrefixLM())
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        given = torch.nn.functional.pad(batch.ranges_tensor(), (0, 0, 0, 1))[:, order]
        spans = ranges.parse(PrefixLM(), given, stage.sizes)
        assert torch.equal(intervals.row_bounds(PrefixLM(), spans, stage.sizes, stage.where).hi, stage.bounds.hi)


@pytest.mark.parametrize(
    "mask", [PrefixLM(), PrefixLM(20), PrefixLM(20, clamp=False)], ids=["global", "clamped", "joined"]
)
def test_flex_attention_composes_the_same_mask(mask: PrefixLM) -> None:
    keys, spans = 200, ((10, 60), (60, 70), (150, 200))
    owner = torch.full((keys,), -1)
    for index, (start, end) in enumerate(spans):
        owner[start:end] = index

    def causal(b, h, q, kv):
        return q >= kv

    def window(b, h, q, kv):
        return q - kv < (mask.window or keys)

    def same_span(b, h, q, kv):
        return (owner[q] == owner[kv]) & (owner[q] >= 0)

    if mask.clamp:
        composed = flex.and_masks(flex.or_masks(causal, same_span), window)
    else:
        composed = flex.or_masks(flex.and_masks(causal, window), same_span)
    wanted = flex.create_mask(composed, 1, 1, keys, keys, device="cpu")[0, 0]
    assert torch.equal(dense_mask(mask, keys, keys, {"image": spans}), wanted)
    assert torch.equal(dense(prepare(Batch(((keys, keys),), (spans,)), mask).bounds, keys), wanted)


def test_bounds_are_clipped_to_the_keys_and_empty_rows_have_one_form() -> None:
    lo, hi = (torch.tensor(values, dtype=torch.int32)[:, None] for values in ([-5, 3, 7, 9], [4, 99, 7, 8]))
    lo, hi = intervals.clipped(
        lo, hi, intervals.Tokens(*torch.tensor([[0] * 4, [0] * 4, [10] * 4, [0] * 4], dtype=torch.int32))
    )
    assert lo[:, 0].tolist() == [0, 3, EMPTY_LO, EMPTY_LO]
    assert hi[:, 0].tolist() == [4, 10, EMPTY_HI, EMPTY_HI]


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**31 + 2, 2**40])
def test_a_window_wider_than_int32_is_no_window(window: int) -> None:
    batch = UGLY["span at both borders"]
    wide, none = prepare(batch, PrefixLM(window)).bounds, prepare(batch, PrefixLM()).bounds
    assert torch.equal(wide.lo, none.lo)
    assert torch.equal(wide.hi, none.hi)
