"""The bounds of all rows from the few that tell, against evaluating the mask at every row, bit for bit."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fa4_prefixlm as fp
from fa4_prefixlm.batch import lengths, ranges
from fa4_prefixlm.geometry import intervals, telling_rows
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.geometry.telling_rows import Pieces, TellingRows
from fa4_prefixlm.geometry.traits import traits
from fa4_prefixlm.masks import causal, key_in, key_outside, one_block, prefix, query_in, same_span, window
from fa4_prefixlm.masks.base import Mask, ends_of
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO
from fa4_prefixlm.masks.models.catalogue import CATALOGUE
from fa4_prefixlm.masks.protocols import Ends
from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch, random_spans
from fa4_prefixlm.testing.stages import sizes_of
from tests.geometry.test_measured import random_expression
from tests.geometry.test_positions import SPANS, WHOLE, shard

CPU = torch.device("cpu")
MASKS = (
    causal & (window(9) | key_in("a")),
    window(20, 5) & (causal | key_outside("a")),
    key_in("a") | same_span("b", before=7),
    causal & (window(5) | prefix("a") | query_in("b") & key_in("a")),
    one_block("a") & window(30),
    fp.PrefixLM(12),
)


def same_bounds(mask: Mask, spans: ranges.SpanSets, sizes: lengths.Lengths) -> Pieces | None:
    """The pieces of a batch, which say all rows; None: a tag is part of what rows see, or there are no rows."""
    telling = TellingRows(mask, spans, sizes)
    wanted = intervals.row_bounds(mask, spans, sizes, intervals.tokens(sizes))
    if telling.bounds.tags is not None or not sizes.total_q:
        return None
    found = telling.pieces(wanted.count)
    assert found is not None, mask
    assert_same(found.bounds(sizes.total_q, CPU), wanted)
    return found


def assert_same(found: Bounds, wanted: Bounds) -> None:
    for mine, theirs in ((found.lo, wanted.lo), (found.hi, wanted.hi)):
        assert mine.dtype == theirs.dtype == torch.int32
        assert torch.equal(mine, theirs)


def checked(mask: Mask, batch: Batch, spans: dict[str, tuple]) -> Pieces | None:
    sizes = sizes_of(batch)
    try:
        own = ranges.parse(mask, spans, sizes)
    except fp.InputError:  # spans that the chunk would have to hold whole
        return None
    return same_bounds(mask, own, sizes)


@pytest.mark.parametrize("seed", range(8))
def test_random_masks(seed: int) -> None:
    rng, count = random.Random(seed), 0
    while count < 60:
        mask, batch = random_expression(rng), random_batch(rng, longest=400)
        spans = {name: tuple(random_spans(rng, keys) for _, keys in batch.seqlens) for name in mask.names}
        count += checked(mask, batch, spans) is not None


@pytest.mark.parametrize("name", UGLY)
def test_ugly_batches(name: str) -> None:
    batch = UGLY[name]
    for mask in MASKS:
        checked(mask, batch, {own: batch.spans for own in mask.names})


@st.composite
def expressions(draw: st.DrawFn) -> Mask:
    return random_expression(random.Random(draw(st.integers(0, 2**32))), depth=draw(st.integers(0, 4)))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, dict[str, tuple]]:
    """Chunks and whole sequences, with spans that touch, of one token, and past the keys that are here."""
    seqlens, spans = [], {"a": [], "b": [], "image": []}
    for _ in range(draw(st.integers(1, 3))):
        keys = draw(st.integers(0, 40))
        seqlens.append((draw(st.integers(0, keys)), keys))
        for own in spans.values():
            edges = sorted(draw(st.sets(st.integers(0, 50), max_size=10)))
            pairs = [pair for pair in itertools.pairwise(edges) if draw(st.booleans())]
            own.append(tuple(pair for pair in pairs if not pair[0] < keys < pair[1]))
    return Batch(tuple(seqlens), tuple(spans["a"])), {name: tuple(own) for name, own in spans.items()}


@settings(max_examples=400, deadline=None)
@given(expressions(), batches())
def test_any_mask_and_spans(mask: Mask, drawn: tuple[Batch, dict[str, tuple]]) -> None:
    batch, spans = drawn
    assume(batch.cu_q[-1] > 0)
    checked(mask, batch, {name: spans[name] for name in mask.names})


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_shards_of_a_sequence(mask: Mask) -> None:
    whole = lengths.batched(2, max(WHOLE), max(WHOLE), CPU)
    spans = ranges.parse(mask, {name: SPANS for name in mask.names}, whole)
    rng = random.Random(str(mask))
    for _ in range(30):
        same_bounds(mask, spans, shard(rng))


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue(name: str) -> None:
    example = CATALOGUE[name]
    mask, given = example.mask, example.ranges
    assert (ends_of(mask) is None) == (name in ("bd3lm", "teacher-forcing")), "their blocks end at every few rows"
    named = given if isinstance(given, dict) else {own: given or () for own in mask.names}
    for rows in (example.seqlen, 7):
        batch = Batch(((rows, example.seqlen), (0, 3), (3, 3)), ())
        spans = {own: (tuple(values), (), ()) for own, values in named.items()}
        if ends_of(mask) is not None:
            assert checked(mask, batch, spans) is not None or rows == 7 or one_block_of_many(mask, named)


def one_block_of_many(mask: Mask, named: dict) -> bool:
    block = mask.split_block()
    return block is not None and len(named[block[1]]) > 1


def test_rows_of_cross_attention_see_all_spans() -> None:
    sizes = lengths.batched(2, 50, 9, CPU, more_queries=True)
    found = same_bounds(key_in("a"), ranges.parse(key_in("a"), {"a": [[(1, 3), (4, 6)], [(0, 9)]]}, sizes), sizes)
    assert found is not None
    assert found.bounds(100, CPU).lo.tolist() == [[1, 4]] * 50 + [[0, EMPTY_LO]] * 50


def plan(mask: Mask, spans: list, rows: int = 3000, sequences: int = 1) -> fp.Plan:
    q = torch.empty(rows * sequences, 1, 16)
    cu = [rows * index for index in range(sequences + 1)]
    return fp.plan({"a": spans}, like=(q, q, q), cu_seqlens_q=cu, cu_seqlens_k=cu, mask=mask, backend="reference")


MANY = causal & (window(100) | key_in("a"))


def test_a_plan_evaluates_its_mask_once_at_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    right = telling_rows.row_bounds

    def counted(mask, spans, sizes, where, *more):
        looked_at.append(len(where.position))
        return right(mask, spans, sizes, where, *more)

    monkeypatch.setattr(telling_rows, "row_bounds", counted)
    monkeypatch.setattr("fa4_prefixlm.backends.base.row_bounds", counted)
    for spans in (2, 8):  # as many intervals as kernels take, and more, which are measured
        looked_at.clear()
        made = plan(MANY, [[(300 * n + 7, 300 * n + 50) for n in range(spans)]])
        assert len(looked_at) == 1
        assert looked_at[0] < 200
        wanted = right(made.mask, made.spans, made.lengths, intervals.tokens(made.lengths), made.traits.intervals)
        assert_same(made.bounds, wanted)


def test_rows_that_are_left_out_are_found_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what is left still says the same: never another bound."""
    made = plan(MANY, [[(300 * n + 7, 300 * n + 50) for n in range(8)]])
    right, missing = TellingRows(made.mask, made.spans, made.lengths).where.row, 0
    assert right is not None
    for left_out in range(1, len(right) - 1):
        rows = torch.cat([right[:left_out], right[left_out + 1 :]])
        monkeypatch.setattr(TellingRows, "_listed", lambda *_, rows=rows: rows)
        pieces = TellingRows(made.mask, made.spans, made.lengths).pieces(made.bounds.count)
        if pieces is None:
            missing += 1
        else:
            assert_same(pieces.bounds(3000, CPU), made.bounds)
    assert missing > 10
    monkeypatch.setattr(TellingRows, "_listed", lambda *_: right[::9].contiguous())
    assert_same(plan(MANY, [[(300 * n + 7, 300 * n + 50) for n in range(2)]]).bounds, by_all_rows(2))


def by_all_rows(spans: int) -> Bounds:
    made = plan(MANY, [[(300 * n + 7, 300 * n + 50) for n in range(spans)]])
    return intervals.row_bounds(made.mask, made.spans, made.lengths, intervals.tokens(made.lengths), made.bounds.count)


def test_pieces_that_do_not_say_all_rows() -> None:
    row = torch.tensor([0, 1, 6], dtype=torch.int32)
    for lo, hi, said in (
        ([0, 3, 3], [5, 9, 9], True),
        ([0, 3, 8], [5, 9, 14], True),  # both move
        ([0, 3, 4], [5, 9, 9], False),
        ([0, 3, 3], [5, 9, 8], False),
        ([0, 3, EMPTY_LO], [5, 9, EMPTY_HI], False),
        ([EMPTY_LO, 0, 5], [EMPTY_HI, 9, 9], True),
    ):
        pieces = Pieces(row, *(torch.tensor(own, dtype=torch.int32).unsqueeze(1) for own in (lo, hi)))
        assert pieces.say_all() == said


def test_many_sequences_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TellingRows, "_listed", lambda *_: pytest.fail("listed"))
    for sequences in (200, telling_rows.MOST_ROWS + 1):
        made = plan(MANY, [[(2, 5), (8, 9)]] * sequences, rows=20, sequences=sequences)
        assert made.bounds.count == made.traits.intervals == 3


@pytest.mark.parametrize("sets", [("a",), ("a", "b")])
def test_the_bound_of_how_many_rows_tell(sets: tuple[str, ...]) -> None:
    rng = random.Random(1)
    mask = causal & (window(9) | key_in("a") | same_span(sets[-1], before=4))
    for _ in range(50):
        batch = random_batch(rng, longest=200)
        sizes = sizes_of(batch)
        spans = ranges.parse(
            causal & key_outside("a") | key_outside("b") if len(sets) > 1 else key_outside("a"),
            {name: tuple(random_spans(rng, keys) for _, keys in batch.seqlens) for name in sets},
            sizes,
        )
        telling = TellingRows(mask, spans, sizes)
        ends = ends_of(mask)
        assert ends is not None
        assert len(telling._listed(ends)) <= telling._at_most(ends)


class PastTheKeys(type(causal)):  # type: ignore[misc]
    """Sees one key too many at the last row, and says where its intervals end."""

    def intervals(self, rows):
        lo, hi = super().intervals(rows)
        return lo, torch.where(hi == rows.seqlen_k.unsqueeze(1), hi + 1, hi)

    def ends(self) -> Ends:
        return Ends(of_row=frozenset({1, 2}))

    edges = Mask.edges


@pytest.mark.parametrize("spans", [2, 8])
def test_errors_name_the_row_of_the_batch(spans: int) -> None:
    """Where rows are looked at for their bounds, and where already their intervals are counted."""
    mask = PastTheKeys() | key_in("a") & window(1)
    with pytest.raises(fp.InputError, match=r"mask: expected keys within \[0, 3000\) for row 2999 from"):
        plan(mask, [[(300 * n + 7, 300 * n + 50) for n in range(spans)]])


class Uncounted(type(key_in("a"))):  # type: ignore[misc]
    def count(self, spans):
        return 1

    ends = type(key_in("a")).ends
    intervals = type(key_in("a")).intervals


def test_more_intervals_than_the_mask_counts() -> None:
    mask = causal & Uncounted("a")
    with pytest.raises(fp.InputError, match=r"at most 1 intervals for row 20, .* got \[\(0, 2\), \(20, 21\)\]"):
        plan(mask, [[(0, 2), (20, 30)]])


def test_what_the_host_does_not_know() -> None:
    sizes = sizes_of(Batch(((50, 50),), ()))
    spans = ranges.parse(MANY, {"a": [[(0, 2), (20, 30)]]}, sizes)
    assert TellingRows(MANY, spans, sizes).known
    unknown = {"a": ranges.Spans(spans["a"].values, None, 10)}
    assert not TellingRows(MANY, unknown, sizes).known
    assert TellingRows(MANY, unknown, sizes).pieces(3) is None
    by_value = fp.masks.from_flex(lambda b, h, q, kv: q >= kv)
    assert not TellingRows(by_value, {}, sizes).known
    assert traits(MANY, spans, sizes).intervals == 3
