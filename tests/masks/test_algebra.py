"""Mask expressions against plain Python over booleans, FlexAttention and torch's SDPA, and what is refused."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

import fa4_prefixlm as fp
from fa4_prefixlm.geometry import block_lists as blocks
from fa4_prefixlm.geometry import intervals
from fa4_prefixlm.geometry import tiles as tiling
from fa4_prefixlm.masks import (
    PrefixLM,
    causal,
    from_flex,
    key_in,
    key_outside,
    one_block,
    prefix,
    query_in,
    same_span,
    window,
)
from fa4_prefixlm.masks.atoms import KeyIn
from fa4_prefixlm.masks.flex import EvaluatedMask
from fa4_prefixlm.testing.batches import Batch, random_batch, random_spans
from fa4_prefixlm.testing.stages import dense, prepare
from tests.geometry.tile_lists import check_list, read, tiles_of

NAMES = ("image", "prompt")


def atoms() -> st.SearchStrategy[fp.Mask]:
    name = st.sampled_from(NAMES)
    named = [st.builds(make, name) for make in (same_span, prefix, key_in, key_outside, query_in, one_block)]
    named.append(st.builds(same_span, name, before=st.integers(0, 20)))
    left, right = st.none() | st.integers(1, 40), st.none() | st.integers(0, 40)
    return st.one_of(st.just(causal), st.builds(window, left, right), *named)


def expressions() -> st.SearchStrategy[fp.Mask]:
    return st.recursive(
        atoms(),
        lambda inner: st.builds(lambda a, b, union: a | b if union else a & b, inner, inner, st.booleans()),
        max_leaves=5,
    )


def sets_for(mask: fp.Mask, batch: Batch, rng: random.Random) -> dict[str, list]:
    return {name: [random_spans(rng, keys) for _, keys in batch.seqlens] for name in sorted(mask.names)}


def said(mask: fp.Mask, p: int, kv: int, spans: dict[str, tuple]) -> bool:
    """The mask of one pair by its repr, evaluated in plain Python over booleans: a third way to say it."""

    def holds(name: str, position: int) -> int | None:
        return next((i for i, (start, end) in enumerate(spans[name]) if start <= position < end), None)

    def same_span_and_before(name: str, before: int = 0) -> bool:
        index = holds(name, p)
        return index is not None and spans[name][index][0] - before <= kv < spans[name][index][1]

    def latest_end(name: str) -> int:
        return max(((start, end) for start, end in spans[name] if start <= p), default=(0, 0))[1]

    return eval(
        repr(mask),
        {
            "causal": kv <= p,
            "everything": True,
            "window": lambda w, r=None: (w is None or p - kv < w) and (r is None or kv - p <= r),
            "same_span": same_span_and_before,
            "prefix": lambda name: kv < latest_end(name),
            "key_in": lambda name: holds(name, kv) is not None,
            "key_outside": lambda name: holds(name, kv) is None,
            "query_in": lambda name: holds(name, p) is not None,
            "one_block": lambda name: holds(name, p) is not None and holds(name, kv) is not None,
        },
    )


def check_expression(mask: fp.Mask, batch: Batch, spans: dict[str, list], python: bool = True) -> None:
    stage = prepare(batch, mask, spans)
    seen = 0
    for index, (rows, keys) in enumerate(batch.seqlens):
        own = {name: given[index] for name, given in spans.items()}
        wanted = mask.dense(seqlen=keys, ranges=own or None, seqlen_q=rows)
        if python:
            offset = keys - rows
            slow = [[said(mask, row + offset, kv, own) for kv in range(keys)] for row in range(rows)]
            assert torch.equal(wanted, torch.tensor(slow, dtype=torch.bool).reshape(rows, keys))
        here = slice(batch.cu_q[index], batch.cu_q[index] + rows)
        found = dense(stage.bounds, keys, here)
        if stage.bounds.tags is not None:
            tags = stage.bounds.tags.key_tag[batch.cu_k[index] : batch.cu_k[index] + keys]
            found |= stage.bounds.tags.row_tag[here, None] == tags
        assert torch.equal(found, wanted)
        seen += int(wanted.sum())
    assert int(stage.bounds.visible_pairs(stage.where)) == seen
    assert stage.bounds.count <= max(1, stage.traits.intervals)
    lo, hi = stage.bounds.lo.long(), stage.bounds.hi.long()
    assert ((lo[:, 1:] > hi[:, :-1]) | (lo[:, 1:] == intervals.EMPTY_LO)).all(), "disjoint, ascending, not touching"
    check_tiles(mask, batch, spans, stage)


def check_tiles(
    mask: fp.Mask, batch: Batch, spans: dict[str, list], stage, block_m: int = 16, block_n: int = 8
) -> None:
    """The varlen lists hold exactly the tiles that are not empty, and call full only what is full."""
    tiles = tiling.query_tiles(stage.sizes, block_m)
    found = tiling.classify(stage.bounds, tiles, stage.sizes, stage.where, block_m, block_n, banded=stage.traits.banded)
    lists = blocks.varlen_lists(found, tiles, stage.sizes, stage.traits, block_m, block_n)
    tile = 0
    for index, (rows, keys) in enumerate(batch.seqlens):
        own = {name: given[index] for name, given in spans.items()}
        visible = mask.dense(seqlen=keys, ranges=own or None, seqlen_q=rows)
        for row in range(tiling.ceil_div(rows, block_m)):
            at = int(lists.cu_entries[index]) + row * tiling.ceil_div(keys, block_n)
            partial = read(lists.partial_count[0, tile], lists.partial_idx[0], at)
            full = read(lists.full_count[0, tile], lists.full_idx[0], at)
            some, every = tiles_of(visible, slice(row * block_m, (row + 1) * block_m), block_n)
            if stage.traits.tagged:
                assert set(full) <= every
                every = set(full)
            check_list(partial, full, some, every, exact=True)
            tile += 1


@settings(max_examples=250, deadline=None)
@given(mask=expressions(), seed=st.integers(0, 2**32))
@pytest.mark.slow
def test_random_expressions(mask: fp.Mask, seed: int) -> None:
    rng = random.Random(seed)
    batch = random_batch(rng, longest=30)
    check_expression(mask, batch, sets_for(mask, batch, rng))


@settings(max_examples=60, deadline=None)
@given(mask=expressions(), seed=st.integers(0, 2**32))
def test_tiles_of_longer_sequences(mask: fp.Mask, seed: int) -> None:
    rng = random.Random(seed)
    batch = random_batch(rng, longest=200)
    check_expression(mask, batch, sets_for(mask, batch, rng), python=False)


@settings(max_examples=25, deadline=None)
@given(mask=expressions(), seed=st.integers(0, 2**32), chunk=st.booleans())
def test_flex_attention_sees_the_same(mask: fp.Mask, seed: int, chunk: bool) -> None:
    rng = random.Random(seed)
    keys, rows = 24, 9 if chunk else 24
    spans = {name: [random_spans(rng, keys) for _ in range(2)] for name in sorted(mask.names)}
    mask_mod = mask.flex(seqlen=keys, seqlen_q=rows, ranges=spans or None)
    built = create_mask(mask_mod, 2, 1, rows, keys, device="cpu")[:, 0]
    for index in range(2):
        own = {name: given[index] for name, given in spans.items()}
        assert torch.equal(built[index], mask.dense(seqlen=keys, ranges=own or None, seqlen_q=rows))


@settings(max_examples=25, deadline=None)
@given(mask=expressions(), seed=st.integers(0, 2**32), chunk=st.booleans())
def test_create_block_mask_finds_the_same_tiles(mask: fp.Mask, seed: int, chunk: bool) -> None:
    """FlexAttention evaluates the mask to find its blocks; the lists here come from intervals."""
    rng = random.Random(seed)
    keys, rows, block_m, block_n = 100, 45 if chunk else 100, 16, 8
    spans = {name: [random_spans(rng, keys)] for name in sorted(mask.names)}
    mask_mod = mask.flex(seqlen=keys, seqlen_q=rows, ranges=spans or None)
    theirs = create_block_mask(mask_mod, 1, 1, rows, keys, device="cpu", BLOCK_SIZE=(block_m, block_n))
    stage = prepare(Batch(((rows, keys),), ((),)), mask, spans)
    tiles = tiling.query_tiles(stage.sizes, block_m)
    ours = tiling.classify(stage.bounds, tiles, stage.sizes, stage.where, block_m, block_n, banded=stage.traits.banded)
    columns = tiling.ceil_div(keys, block_n)
    for row in range(tiling.ceil_div(rows, block_m)):
        partial = set(ours.partial_matrix(columns)[row, : int(ours.partial[row])].tolist())
        full = set(ours.full_matrix(columns)[row, : int(ours.full[row])].tolist())
        their_partial = set(theirs.kv_indices[0, 0, row, : int(theirs.kv_num_blocks[0, 0, row])].tolist())
        their_full = set(theirs.full_kv_indices[0, 0, row, : int(theirs.full_kv_num_blocks[0, 0, row])].tolist())
        assert partial | full == their_partial | their_full
        if (row + 1) * block_m > rows:
            continue  # FlexAttention calls no tile full that crosses the last query
        assert full <= their_full
        assert full == their_full or stage.traits.tagged


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(mask=expressions(), seed=st.integers(0, 2**32))
def test_flex_attention_computes_the_same(mask: fp.Mask, seed: int) -> None:
    rng = random.Random(seed)
    spans = {name: [random_spans(rng, 40) for _ in range(2)] for name in sorted(mask.names)}
    q, k, v = (torch.randn(2, 40, heads, 16, generator=torch.Generator().manual_seed(seed)) for heads in (2, 1, 1))
    mask_mod = mask.flex(seqlen=40, ranges=spans or None)
    visible = create_mask(mask_mod, 2, 1, 40, 40, device="cpu")[:, 0]
    if not visible.any():
        return
    block_mask = create_block_mask(mask_mod, 2, 1, 40, 40, device="cpu", BLOCK_SIZE=8)
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    wanted = flex_attention(*heads_first, block_mask=block_mask, enable_gqa=True).transpose(1, 2)
    out = fp.attention(q, k, v, spans or None, mask=mask)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(mask=expressions(), seed=st.integers(0, 2**32))
def test_from_flex_finds_the_same_intervals(mask: fp.Mask, seed: int) -> None:
    rng = random.Random(seed)
    batch = Batch(((20, 20), (7, 20)), ((), ()))
    spans = {name: [random_spans(rng, 20) for _ in range(2)] for name in sorted(mask.names)}
    back = EvaluatedMask(mask.flex(seqlen=20, ranges=spans or None), 20)
    wanted = [mask.dense(seqlen=20, ranges={n: s[i] for n, s in spans.items()} or None) for i in range(2)]
    bounds = prepare(batch, back, {}).bounds
    assert torch.equal(dense(bounds, 20, slice(0, 20)), wanted[0])
    assert torch.equal(dense(bounds, 20, slice(20, 27)), wanted[1][-7:])


def test_attention_of_expressions_on_the_reference() -> None:
    q, k, v = (torch.randn(2, 40, heads, 16) for heads in (4, 2, 2))
    spans = {"image": [[(4, 20), (25, 30)], [(0, 40)]], "prompt": [[(0, 4)], []]}
    mask = (causal | same_span("image")) & (window(6) | prefix("prompt"))
    out = fp.attention(q, k, v, spans, mask=mask)
    visible = torch.stack([mask.dense(seqlen=40, ranges={n: s[i] for n, s in spans.items()}) for i in range(2)])
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=visible[:, None], enable_gqa=True)
    torch.testing.assert_close(out, wanted.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_masks_are_values() -> None:
    made = [(causal | same_span("image")) & window(8) for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made)) == 1
    assert made[0] != (causal & window(8)) | same_span("image")
    assert repr(made[0]) == "(causal | same_span('image')) & window(8)"
    assert repr(causal & (prefix("prompt") | window(512))) == "causal & (prefix('prompt') | window(512))"
    assert made[0].names == {"image"}
    with pytest.raises(TypeError):
        causal & 3
    with pytest.raises(AttributeError):
        made[0].left = causal


@pytest.mark.parametrize(
    ("mask", "count", "chained"),
    [
        (causal, 1, True),
        ((causal | same_span("image")) & window(9), 1, True),
        ((causal & window(9)) | same_span("image"), 1, True),
        (same_span("image"), 1, False),
        (same_span("image") | query_in("image"), 1, False),
        (causal & same_span("image"), 1, False),
        (causal & (prefix("image") | window(9)), 2, False),
        (causal & (key_in("image") | window(9)), 4, False),
        (causal | one_block("image"), 4, False),
    ],
    ids=str,
)
def test_what_a_mask_costs_is_known_before_running(mask: fp.Mask, count: int, chained: bool) -> None:
    spans = {"image": [[(0, 2), (5, 9), (12, 20)]]} if mask.names else {}
    traits = prepare(Batch(((30, 30),), ((),)), mask, spans).traits
    assert (traits.intervals, traits.banded, traits.tagged) == (count, chained, False)


def test_many_images_in_one_block_run_by_tags() -> None:
    spans = [[(at, at + 3) for at in range(0, 60, 6)]]
    stage = prepare(Batch(((70, 70),), ((),)), causal | one_block("image"), {"image": spans})
    assert stage.traits.tagged
    assert stage.traits.intervals == 1
    assert stage.bounds.tags is not None
    inside = prepare(Batch(((70, 70),), ((),)), window(5) & one_block("image"), {"image": spans})
    assert not inside.traits.tagged  # not written as "... | one_block": one interval a span
    assert inside.traits.intervals == 10


def test_a_block_of_one_span_is_the_span() -> None:
    spans = {"image": [[(5, 40)]]}
    stage = prepare(Batch(((70, 70),), ((),)), causal | one_block("image"), spans)
    assert (stage.traits.intervals, stage.traits.banded, stage.traits.tagged) == (1, True, False)
    assert torch.equal(stage.bounds.hi, prepare(Batch(((70, 70),), ((),)), PrefixLM(), spans).bounds.hi)


def test_a_subclass_with_intervals_of_the_wrong_shape_is_refused() -> None:
    class Wrong(PrefixLM):
        def intervals(self, rows):
            lo, hi = super().intervals(rows)
            return lo[:, 0], hi[:, 0]

    with pytest.raises(fp.InputError, match="mask: expected intervals lo and hi of shape"):
        prepare(Batch(((5, 5),), ((),)), Wrong())


def test_a_mask_that_leaves_its_sequence_is_refused() -> None:
    class Ahead(PrefixLM):
        def intervals(self, rows):
            lo, hi = super().intervals(rows)
            return lo, hi + 2

    with pytest.raises(fp.InputError, match=r"mask: expected keys within \[0, 5\) for row 3 .* got \[\(0, 6\)\]"):
        prepare(Batch(((5, 5),), ((),)), Ahead())


def test_two_lists_can_meet_in_more_intervals_than_either_has() -> None:
    spans = {"image": [[(0, 10), (12, 20)]], "prompt": [[(2, 5), (8, 14)]]}
    check_expression(key_in("image") & key_in("prompt"), Batch(((20, 20),), ((),)), spans)
    bounds = prepare(Batch(((20, 20),), ((),)), key_in("image") & key_in("prompt"), spans).bounds
    assert list(zip(bounds.lo[0].tolist(), bounds.hi[0].tolist(), strict=True)) == [(2, 5), (8, 10), (12, 14)]


def test_a_subclass_that_says_anew_what_rows_see_is_heard_within_an_expression() -> None:
    class FirstKey(KeyIn):
        def intervals(self, rows):
            lo = torch.zeros_like(rows.position).unsqueeze(1)
            return lo, lo + 1

    mask = causal & (window(2) | FirstKey("image"))
    found = dense(prepare(Batch(((8, 8),), (((3, 5),),)), mask).bounds, 8)
    assert torch.equal(found, torch.tensor([[k == 0 or p - k in (0, 1) for k in range(8)] for p in range(8)]))


def test_show() -> None:
    mask = (causal | same_span("image")) & window(3)
    shown = mask.show(seqlen=6, ranges={"image": [(1, 5)]}, seqlen_q=3)
    assert repr(shown).splitlines()[:3] == [".###o.", "..###.", "...###"]
    assert shown._repr_png_()[:4] == b"\x89PNG"
    two = causal & (prefix("prompt") | window(2))
    assert str(two.show(seqlen=5, ranges={"prompt": [(0, 2)]})).splitlines()[4] == "oo.##"


def test_prefix_counts_from_the_latest_span() -> None:
    mask = prefix("prompt") & same_span("document")
    spans = {"prompt": [(0, 2), (5, 7)], "document": [(0, 5), (5, 10)]}
    lines = str(mask.show(seqlen=10, ranges=spans)).splitlines()
    assert lines[4] == "oo........"
    assert lines[9] == ".....oo..."


def test_lengths_of_empty_sequences() -> None:
    check_expression(
        causal | one_block("image"),
        Batch(((0, 0), (3, 5), (0, 2)), ((), (), ())),
        {"image": [[], [(0, 2), (3, 5)], []]},
    )


def test_without_spans_all_keys_are_outside() -> None:
    for mask in (key_outside("image"), causal & key_outside("image"), same_span("image") | key_outside("image")):
        check_expression(mask, Batch(((5, 5), (3, 9)), ((), ())), {"image": [[], []]})
    traits = prepare(Batch(((5, 5),), ((),)), causal & key_outside("image"), {"image": [[]]}).traits
    assert traits.intervals == 1


def test_rows_with_gaps_between_what_they_see_make_no_chain() -> None:
    batch = Batch(((64, 64),), ((),))
    for mask in (same_span("image") | same_span("prompt"), same_span("image"), query_in("image") & same_span("image")):
        spans = {"image": [[(0, 3), (40, 50)]], "prompt": [[(5, 7), (60, 64)]]}
        check_expression(mask, batch, {name: spans[name] for name in mask.names})


def test_what_rows_really_see_counts_where_the_formula_says_too_many() -> None:
    """With many documents `key_in & same_span` is bounded by their number, and each row still sees two intervals."""
    documents = [(at, at + 10) for at in range(0, 80, 10)]
    spans = {"reference": [[(at, at + 2) for at in range(0, 80, 10)]], "document": [documents]}
    mask = ((causal & window(4)) | (causal & key_in("reference"))) & same_span("document")
    assert mask.count({"reference": 8, "document": 8}) == 9
    q = torch.randn(1, 80, 2, 8)
    plan = fp.plan(spans, like=(q, q, q), mask=mask)
    assert plan.traits.intervals == 2
    assert plan.bounds.count == 2
    assert "2 intervals a row" in str(plan)
    named = {name: own[0] for name, own in spans.items()}
    assert torch.equal(dense(plan.bounds, 80), mask.dense(seqlen=80, ranges=named))
    many = fp.plan([[(at, at + 1) for at in range(0, 80, 8)]], like=(q, q, q), mask=causal & key_in("image"))
    assert many.traits.intervals == 10
    refusal = dict(many.choice.passed_over)["varlen"]
    assert refusal == "a row may see 10 intervals of keys, the kernels take 4"
    lazy = fp.plan(None, like=(q, q, q), mask=from_flex(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, max_intervals=9))
    assert (lazy.traits.intervals, lazy.bounds.count) == (1, 1)


def test_masks_have_no_truth_value() -> None:
    for combine in (lambda: causal and window(4), lambda: not causal, lambda: causal or window(4)):
        with pytest.raises(TypeError, match="& and |"):
            combine()


def test_arguments_in_the_wrong_place() -> None:
    q = torch.randn(1, 8, 2, 8)
    with pytest.raises(fp.InputError, match="ranges: expected spans; a mask goes to mask=, got causal"):
        fp.attention(q, q, q, causal)
    with pytest.raises(fp.InputError, match="clamp: expected True or False, got 'yes'"):
        PrefixLM(4, clamp="yes")
    with pytest.raises(fp.InputError, match="a chunk holds a span whole or not at all"):
        fp.attention(q, q, q, [[(2, 9)]])
    with pytest.raises(fp.InputError, match="got Tensor"):
        fp.attention(q, q, q, mask=q)


def test_a_mask_that_counts_too_few_intervals_is_refused_not_cut() -> None:
    class Undercounted(KeyIn):
        def count(self, spans):
            return 1

    q = torch.randn(1, 20, 2, 8)
    with pytest.raises(fp.InputError, match=r"at most 1 intervals for row 0, .* got \[\(0, 2\), \(5, 9\)\]"):
        fp.plan([[(0, 2), (5, 9)]], like=(q, q, q), mask=Undercounted("image"))
