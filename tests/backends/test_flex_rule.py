"""FlexAttention by a mask's own rule, on the CPU: the rule over its tables against the rows' bounds, pair by pair."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch._dynamo.utils import counters

import fa4_prefixlm as fp
from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.backends.flex import FlexCall, flex_call
from fa4_prefixlm.backends.flex_attend import BLOCK, LEAST_INT32, Tables, seen_by
from fa4_prefixlm.backends.flex_rule import NO_KEY, rule_for
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.masks import (
    block_diffusion,
    causal,
    everything,
    from_flex,
    key_in,
    key_outside,
    one_block,
    prefix,
    query_in,
    same_span,
    tree_mask,
    window,
)
from fa4_prefixlm.masks.given import GivenRows
from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch
from fa4_prefixlm.testing.empty_rows import Blind
from tests.backends.test_flex import check, plan_of
from tests.geometry.test_positions import shard
from tests.kernels.test_plan_rows import masked_batch, on_device_only

SEEN = key_in("seen")
# Every atom, with one that shows rows many intervals.
MASKS = [
    SEEN,
    everything & key_outside("seen"),
    causal & (window(20) | SEEN),
    causal & key_outside("seen"),
    window(30, 9) & SEEN,
    window(None, 40) & key_outside("seen"),
    window(2**40, 2**40) & SEEN,
    (causal | same_span("image")) & (SEEN | window(9)),
    causal & SEEN | same_span("image", before=29),
    causal & SEEN | same_span("image", before=2**40),
    prefix("image") & key_outside("seen"),
    query_in("image") & SEEN | causal & window(5),
    causal & (one_block("image") | SEEN),
    causal & one_block("seen"),
    fp.PrefixLM(200) & SEEN,
    fp.PrefixLM(15, clamp=False) | causal & SEEN,
    (causal & SEEN | same_span("image")) & same_span("document"),
    (prefix("image") & same_span("document") | window(3, 2)) & key_outside("seen"),
]
WANTED = 9
SEVERAL_COPIES = Batch(((190, 190), (40, 120)), ((), ()))
CLEAN = [[(at, at + 17) for at in range(0, 100, 20)], [(at, at + 9) for at in range(60, 120, 10)]]
COPIES = {"noised": [[(100, 150), (155, 190)], [(0, 33)]], "clean": CLEAN}


def many_spans(rng: random.Random, keys: int, least: int = 0) -> list[tuple[int, int]]:
    """Disjoint ones in any order; many touch, some begin past the keys."""
    count = max(least, rng.choice([0, 1, WANTED, 2 * WANTED]))
    room = max(rng.choice([keys, 6 * count]), 2 * count + 1)
    cuts = sorted(rng.sample(range(room + 1), 2 * count))
    found = [tuple(cuts[at : at + 2]) for at in range(0, 2 * count, 2)]
    if rng.random() < 0.5:  # adjacent to the one before
        found = [(found[at - 1][1] if at and rng.random() < 0.5 else own[0], own[1]) for at, own in enumerate(found)]
    found = [(start, min(end, keys) if start < keys else end) for start, end in found]  # not cut by the end of the keys
    if rng.random() < 0.3:
        found.append((max(room, keys) + 10, 2**31 - 1))
    rng.shuffle(found)
    return found


def spans_of(rng: random.Random, batch: Batch, mask: fp.Mask) -> dict[str, list]:
    """Of each set; of "seen" many in some sequence, and none past the keys where masks may not be without them."""
    named = {}
    for name in sorted(mask.names):
        named[name] = [many_spans(rng, keys) for _, keys in batch.seqlens]
        longest = max(range(len(batch.seqlens)), key=lambda at: batch.seqlens[at][1])
        named[name][longest] = many_spans(rng, batch.seqlens[longest][1], WANTED if name == "seen" else 1)
        for index, (_, keys) in enumerate(batch.seqlens):
            if mask.whole(name) not in ("nothing", "span"):
                named[name][index] = [own for own in named[name][index] if own[1] <= keys]
    return named


def spans_for_the_rule(mask: fp.Mask, batch: Batch, seed: int = 0) -> dict[str, list]:
    """With which some row sees so many that its rule tells; where spans touch or windows are short, none may."""
    for attempt in range(100):
        spans = spans_of(random.Random(f"{mask} {seed} {attempt}"), batch, mask)
        plan, _ = plan_of(batch, mask, spans)
        if plan.prepared.rule is not None:
            return spans
    raise AssertionError(f"no row of {mask} ever sees many intervals")


def told(call: FlexCall, tables=None) -> torch.Tensor:
    """What the kernel would be told of every pair of the padded batch."""
    form = call._form(Options(1.0), with_grad=False)
    row, key = torch.arange(call.rows * BLOCK).unsqueeze(1), torch.arange(call.keys * BLOCK).unsqueeze(0)
    return seen_by(form, tables or call.tables)(row, key)


def wanted_of(given: MaskedBatch, like: torch.Tensor) -> torch.Tensor:
    """The same by the bounds of the rows."""
    result, bounds = torch.zeros_like(like), given.packed_bounds
    key = torch.arange(like.shape[1])
    for lo, hi in zip(bounds.lo.T.unsqueeze(2), bounds.hi.T.unsqueeze(2), strict=True):
        result[: len(lo)] |= (key >= lo) & (key < hi)
    return result


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_the_rule_says_what_the_bounds_say(mask: fp.Mask) -> None:
    """Packed, chunked, with empty sequences; whoever knows the values; also where no row of a short batch sees many."""
    rng, told_by_rule = random.Random(str(mask)), 0
    batches = [*UGLY.values(), *(random_batch(rng) for _ in range(12))]
    for batch in batches:
        given = masked_batch(batch, mask, spans=spans_of(rng, batch, mask))
        for source in (given, on_device_only(given)):
            call = flex_call(source)
            told_by_rule += call.rule is not None
            found = told(call)
            assert torch.equal(found, wanted_of(given, found)), batch
    assert told_by_rule > 0


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask.uses_position], ids=str)
def test_wherever_queries_and_keys_stand(mask: fp.Mask) -> None:
    """Keys that were left out, and queries that are not the last positions, nor among the keys."""
    rng = random.Random(str(mask))
    whole = Batch(((70, 70), (64, 64)), ((), ()))
    for _ in range(30):
        given = masked_batch(whole, mask, spans=spans_of(rng, whole, mask))
        given = dataclasses.replace(given, lengths=shard(rng))
        call = flex_call(given)
        found = told(call)
        assert torch.equal(found, wanted_of(given, found))


def test_more_queries_than_keys() -> None:
    """Where no position matters."""
    q, k = torch.randn(1, 90, 2, 16), torch.randn(1, 60, 2, 16)
    spans = {"seen": [[(at, at + 4) for at in range(0, 60, 6)]]}
    for mask in (SEEN, key_outside("seen")):
        plan = fp.plan(spans, like=(q, k, k), mask=mask, backend="flex")
        assert plan.prepared.rule is not None
        torch.testing.assert_close(plan(q, k, k), fp.attention(q, k, k, spans, mask=mask, backend="reference"))


def test_queries_and_keys_of_other_sequences_in_as_many_tokens() -> None:
    """Whose totals are alike, not their lengths; and whose lengths are, but not where they stand."""
    batch = Batch(((30, 90), (90, 30)), ((), ()))
    plan, _ = plan_of(batch, SEEN, {"seen": [[(at, at + 4) for at in range(0, 90, 9)], [(3, 20)]]})
    assert plan.prepared.rule is not None
    found = told(plan.prepared)
    assert torch.equal(found, wanted_of(plan._batch, found))
    mask, whole = causal & (one_block("image") | SEEN), Batch(((200, 200), (64, 64)), ((), ()))
    given = masked_batch(whole, mask, spans=spans_for_the_rule(mask, whole))
    lengths = dataclasses.replace(given.lengths, query_start=torch.tensor([40, 9], dtype=torch.int32))
    given = dataclasses.replace(given, lengths=lengths)
    call = flex_call(given)
    assert call.rule is not None
    found = told(call)
    assert torch.equal(found, wanted_of(given, found))


def test_a_span_that_ends_where_int32_does() -> None:
    """As only the device may know it: its end among the packed keys would be past that."""
    mask, batch = prefix("image") & key_outside("seen"), Batch(((90, 90), (200, 200)), ((), ()))
    given = masked_batch(
        batch, mask, spans={"image": [[(0, 9)], [(50, 60)]], "seen": [[], [(9 * n, 9 * n + 4) for n in range(20)]]}
    )
    image = dataclasses.replace(given.spans["image"], values=torch.tensor([[[0, 9]], [[50, 2**31 - 1]]]).int())
    given = on_device_only(dataclasses.replace(given, spans={**given.spans, "image": image}))
    call = flex_call(given)
    assert call.rule is not None
    found = told(call)
    assert found[150:290].any()
    assert torch.equal(found, wanted_of(given, found))


def test_several_clean_copies() -> None:
    for mask, spans in ((block_diffusion(8), COPIES), (block_diffusion(2**40) & SEEN, {**COPIES, "seen": CLEAN})):
        given = masked_batch(SEVERAL_COPIES, mask, spans=spans)
        call = flex_call(given)
        assert call.rule is not None
        found = told(call)
        assert torch.equal(found, wanted_of(given, found))


@pytest.mark.parametrize("mask", MASKS[2::3], ids=str)
def test_a_number_that_is_one_off_is_seen(mask: fp.Mask) -> None:
    """Each that the rule reads matters: of rows their place and their spans, of keys their spans."""
    batch = Batch(((300, 300), (100, 200), (60, 60)), ((), (), ()))
    call = flex_call(masked_batch(batch, mask, spans=spans_for_the_rule(mask, batch)))
    found = told(call)
    columns = [("ends", column) for column in range(3, len(call.tables.ends))]  # the first are the sequence and place
    columns += [("of_keys", column) for column in range(0 if call.tables.of_keys is None else len(call.tables.of_keys))]
    if mask.uses_position:
        columns.append(("ends", 2))
    for name, column in columns:
        one_more, one_later = (getattr(call.tables, name).clone() for _ in range(2))
        used = one_more[column] > NO_KEY
        one_more[column] = torch.where(used, one_more[column] + 1, one_more[column])
        one_later[column] = one_later[column].flatten().roll(1).view_as(one_later[column])
        changed = [told(call, call.tables._replace(**{name: own})) for own in (one_more, one_later)]
        assert any(not torch.equal(own, found) for own in changed), (name, column)


def test_the_keys_of_other_sequences_are_not_seen_for_the_rule_says_nothing_of_them() -> None:
    batch = Batch(((300, 300), (100, 200), (60, 60)), ((), (), ()))
    call = flex_call(masked_batch(batch, SEEN, spans=spans_for_the_rule(SEEN, batch)))
    found, ends = told(call), call.tables.ends.clone()
    ends[0], ends[1] = LEAST_INT32, call.keys * BLOCK ^ LEAST_INT32
    assert (told(call, call.tables._replace(ends=ends)) & ~found)[300:400, :300].any()


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_forward(mask: fp.Mask) -> None:
    """Against float64, grouped heads, chunks and rows that see nothing."""
    batch = Batch(((300, 300), (0, 20), (70, 190), (1, 50), (0, 0)), ((),) * 5)
    plan = check(batch, mask, spans_for_the_rule(mask, batch))
    assert "told by the mask's own rule" in str(plan)


class Subclass(type(SEEN)):  # type: ignore[misc]
    """May say anything."""


def test_which_masks_have_a_rule() -> None:
    assert rule_for(causal & (window(20) | SEEN), 4) is None
    assert rule_for(causal & (window(20) | SEEN), 5) is not None
    assert rule_for(tree_mask(9), 9) is None, "as many comparisons as intervals, and more"
    assert rule_for(fp.PrefixLM(3) & SEEN, 9) == rule_for(fp.PrefixLM(3).expression & SEEN, 9)
    for mask in (
        Subclass("seen"),
        causal & (window(20) | Subclass("seen")),
        Blind() & SEEN,
        from_flex(lambda b, h, q, kv: q >= kv, max_intervals=9),
        causal & from_flex(lambda b, h, q, kv: q >= kv, max_intervals=9),
        GivenRows(torch.zeros(1, 4, 20, dtype=torch.int32)),
    ):
        assert rule_for(mask, 99) is None


def test_causal_is_the_end_of_a_rows_keys_and_not_of_the_rule() -> None:
    def rule(mask: fp.Mask) -> tuple[fp.Mask, bool]:
        found = rule_for(mask, 99)
        assert found is not None
        return found.mask, found.causal

    near = window(20) | SEEN
    assert rule(causal & near) == rule(near & causal) == rule(causal & (near & causal)) == (near, True)
    assert rule(near) == (near, False)
    assert rule(causal & near | SEEN) == (causal & near | SEEN, False)
    assert rule(causal & near & SEEN) == (near & SEEN, True)
    assert rule_for(causal & (causal & causal), 99) is None


def test_the_rule_reads_no_table_for_nothing() -> None:
    rule = rule_for(causal & (window(20) | SEEN), 9)
    assert (rule.row_owners, rule.latest_ends, rule.key_owners) == ((), (), ("seen",))
    rule = rule_for(prefix("image") & key_outside("seen") & same_span("document"), 9)
    assert (rule.row_owners, rule.latest_ends, rule.key_owners) == (("document",), ("image",), ("document", "seen"))


def test_tags_stay_as_they_are() -> None:
    batch = Batch(((300, 300),), ((),))
    spans = {"seen": [[(at, at + 7) for at in range(0, 200, 20)]]}
    plan, _ = plan_of(batch, causal & SEEN | one_block("seen"), spans)
    assert plan.prepared.tables.row_tag is not None
    assert plan.prepared.intervals > 4
    assert plan.prepared.rule is None


@pytest.mark.slow
def test_new_ranges_lengths_and_numbers_of_intervals_compile_nothing() -> None:
    mask, dims = (causal & (window(20) | SEEN)) | same_span("image"), (16, 72)  # of no other test
    rng, numbers = random.Random(3), set()

    def one(batch: Batch) -> None:
        plan = check(batch, mask, spans_for_the_rule(mask, batch, rng.random()), dims=dims)
        numbers.add(plan.prepared.intervals)

    one(Batch(((300, 300), (70, 90)), ((), ())))
    before = counters["stats"]["unique_graphs"]
    for _ in range(8):
        one(Batch(((300, 300), *random_batch(rng, empty=False).seqlens), ((),) * 9))
    assert counters["stats"]["unique_graphs"] == before
    assert len(numbers) > 3


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS[2::3], ids=str)
def test_inductor_compiles_what_the_kernel_asks(mask: fp.Mask) -> None:
    """As C++ over all pairs here; in the kernel of a GPU it is Triton, pair by pair."""
    batch = Batch(((300, 300), (70, 190)), ((), ()))
    call = flex_call(masked_batch(batch, mask, spans=spans_for_the_rule(mask, batch)))
    form = call._form(Options(1.0), with_grad=False)

    def dense(tables: Tables, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return seen_by(form, tables)(row, key)

    compiled = torch.compile(dense, backend="inductor", fullgraph=True)
    row, key = torch.arange(call.rows * BLOCK).unsqueeze(1), torch.arange(call.keys * BLOCK).unsqueeze(0)
    assert torch.equal(compiled(call.tables, row, key), told(call))


def test_spans_that_only_the_device_knows() -> None:
    """So that their number is a bound, and no row may see as many."""
    batch, mask = Batch(((300, 300), (70, 190)), ((), ())), causal & (window(20) | SEEN)
    given = masked_batch(batch, mask, spans=spans_of(random.Random(5), batch, mask))
    unknown = dataclasses.replace(on_device_only(given), telling=None)
    call = flex_call(unknown)
    assert call.rule is not None
    assert call.intervals == given.traits.intervals


def test_keys_in_pages() -> None:
    """Which are gathered, and of which only an upper bound may be known."""
    batch, mask = Batch(((20, 160), (30, 30)), ((), ())), causal & (window(20) | SEEN)
    spans = {"seen": [[(at, at + 5) for at in range(0, 160, 16)], [(3, 9)]]}
    plan, (q, k, v) = plan_of(batch, mask, spans)
    pages = batch.in_pages(k, v, 16, seed=1)
    paged = fp.plan(
        spans,
        like=(q, pages.k, pages.v),
        cu_seqlens_q=batch.cu_q,
        seqused_k=torch.tensor(batch.as_seqlens[1], dtype=torch.int32),
        page_table=pages.table,
        mask=mask,
        backend="flex",
    )
    assert paged.choice.gathered
    assert "told by the mask's own rule" in str(paged)
    torch.testing.assert_close(paged(q, pages.k, pages.v), plan(q, k, v), rtol=1e-5, atol=1e-5)
