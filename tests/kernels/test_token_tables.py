"""What `flex` reads of each token, in Triton's interpreter, against the torch path bit for bit.

Run in a process of its own, as `test_row_update.py` is.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.backends.flex import BLOCK, LEAST_BLOCKS, _padded_tags
from fa4_prefixlm.backends.flex_rule import rule_for
from fa4_prefixlm.backends.flex_rule_tables import rule_tables, rule_tables_in_one_launch
from fa4_prefixlm.batch.ranges import Spans, SpanSets
from fa4_prefixlm.geometry.intervals import tags_of, tokens
from fa4_prefixlm.geometry.packed_row_tiles import tag_ranges
from fa4_prefixlm.geometry.tiles import ceil_div
from fa4_prefixlm.masks import causal, key_in, one_block, prefix, query_in, same_span
from fa4_prefixlm.masks.plain_parts import few_parts
from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch
from tests.geometry.test_measured import random_expression
from tests.kernels.test_composed_rows import as_spans
from tests.kernels.test_plan_rows import masked_batch
from tests.kernels.triton_processes import INTERPRETED, compile_for_hopper, random_cases, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")
from fa4_prefixlm.kernels import token_tables

# More than intervals are compared of.
MANY = 50


def batch_of(batch: Batch, spans: SpanSets) -> MaskedBatch:
    return dataclasses.replace(masked_batch(batch, causal), spans=spans, telling=None)


def check_rule(batch: Batch, mask: fp.Mask, spans: SpanSets) -> None:
    given, rule = batch_of(batch, spans), rule_for(mask, MANY)
    if rule is None:
        assert few_parts(mask) == few_parts(causal), "nothing is left to be told by a rule"
        return
    assert token_tables.takes(sorted(mask.names), spans, given.lengths)
    blocks = [max(LEAST_BLOCKS, ceil_div(total, BLOCK)) for total in (given.lengths.total_q, given.lengths.total_k)]
    for mine, wanted in zip(
        rule_tables_in_one_launch(given, rule, *blocks), rule_tables(given, rule, *blocks), strict=True
    ):
        assert mine is wanted is None or torch.equal(mine, wanted), mask


def check_tags(batch: Batch, spans: SpanSets, block: int) -> None:
    given = batch_of(batch, spans)
    lengths, where = given.lengths, tokens(given.lengths)
    wanted = tags_of("image", spans, lengths, where)
    made = given._tags("image")
    assert torch.equal(made.row_tag, wanted.row_tag)
    assert torch.equal(made.key_tag, wanted.key_tag)
    for rows, keys in ((lengths.total_q, lengths.total_k), (ceil_div(lengths.total_q, block) * block + 256, 1280)):
        keys = max(keys, lengths.total_k)
        padded = _padded_tags(wanted, rows, keys)
        found = token_tables.tag_tables(spans["image"], lengths, rows, keys, block)
        assert torch.equal(found.tags.row_tag, padded.row_tag)
        assert torch.equal(found.tags.key_tag, padded.key_tag)
        assert torch.equal(found.rows, tag_ranges(padded.row_tag, block, lengths.batch))
        assert torch.equal(found.keys, tag_ranges(padded.key_tag, block, lengths.batch))


if INTERPRETED:

    @pytest.fixture(autouse=True)
    def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
        """The way of a GPU, on the CPU."""
        monkeypatch.setattr(MaskedBatch, "on_gpu", True)

    @pytest.mark.parametrize("seed", range(12))
    def test_numbers_of_rules(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(random_cases(10)):
            mask, batch = random_expression(rng), random_batch(rng, longest=600)
            check_rule(batch, mask, as_spans(rng, batch, mask.names))

    @pytest.mark.parametrize("seed", range(12))
    def test_tags(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(random_cases(5)):
            batch = random_batch(rng, longest=600)
            check_tags(batch, as_spans(rng, batch, frozenset({"image"})), rng.choice([32, 128]))

    @pytest.mark.parametrize("name", UGLY)
    def test_ugly_batches(name: str) -> None:
        rng = random.Random(name)
        mask = same_span("image") | query_in("b") & key_in("a")
        check_rule(UGLY[name], mask, as_spans(rng, UGLY[name], mask.names))
        check_tags(UGLY[name], as_spans(rng, UGLY[name], frozenset({"image"})), BLOCK)

    def test_spans_that_the_keys_end_within() -> None:
        """Which some masks let a chunk cut."""
        for end in (61, 2**31 - 1):
            values = torch.tensor([[[50, end], [0, 0], [3, 9]], [[20, 25], [30, 40], [0, 4]]], dtype=torch.int32)
            spans = {"image": Spans(values, None, end)}
            check_rule(Batch(((40, 60), (41, 41)), ((), ())), prefix("image") | one_block("image"), spans)

    def test_no_spans() -> None:
        for batch in (UGLY["no spans"], Batch(((0, 0), (0, 40)), ((), ()))):
            given = masked_batch(batch, causal | one_block("image"))
            assert given.spans["image"].values.shape[1] == 0
            check_rule(batch, one_block("image"), given.spans)
            check_tags(batch, given.spans, BLOCK)

else:

    def test_what_is_too_much_goes_another_way() -> None:
        batch, spans = (
            UGLY["span of one token"],
            as_spans(random.Random(0), UGLY["span of one token"], frozenset("abcde")),
        )
        lengths = masked_batch(batch, causal).lengths
        assert token_tables.takes("abcd", spans, lengths)
        assert not token_tables.takes("abcde", spans, lengths)
        wide = dataclasses.replace(spans["a"], values=torch.zeros(1, token_tables.MOST_SPANS + 1, 2, dtype=torch.int32))
        assert not token_tables.takes("a", {"a": wide}, lengths)
        assert not token_tables.takes("a", spans, dataclasses.replace(lengths, key_start=lengths.key_starts()))

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    def test_they_compile_for_hopper() -> None:
        names = ("of_rows", "of_keys", "row_tag", "key_tag", "row_blocks", "key_blocks")
        pointers = dict.fromkeys((*names, "cu_seqlens_q", "cu_seqlens_k", "ranges"), "*i32")
        constants: dict[str, object] = {"BLOCK": token_tables.BLOCK}
        assert ".target sm_90" in compile_for_hopper(token_tables.tags_kernel, pointers, constants)
        constants |= {"NONE": token_tables.LEAST_INT32}
        assert ".target sm_90" in compile_for_hopper(token_tables.rule_numbers_kernel, pointers, constants)
