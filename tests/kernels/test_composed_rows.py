"""The bounds of masks of plain parts, in Triton's interpreter on the CPU, against the torch path bit for bit.

Run in a process of its own, as `test_row_update.py` is.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.backends import base
from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.ranges import Spans
from fa4_prefixlm.geometry.intervals import row_bounds, tokens
from fa4_prefixlm.geometry.telling_rows import TellingRows
from fa4_prefixlm.geometry.traits import as_run, most_spans, traits
from fa4_prefixlm.masks import causal, everything, key_in, key_outside, one_block, prefix, query_in, same_span, window
from fa4_prefixlm.masks.plain_parts import few_parts
from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch, random_spans
from fa4_prefixlm.testing.stages import sizes_of
from tests.geometry.test_measured import random_expression
from tests.kernels.test_plan_rows import masked_batch
from tests.kernels.triton_processes import INTERPRETED, compile_for_hopper, random_cases, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")
from fa4_prefixlm.kernels import composed_rows as kernel

INT32_MAX = 2**31 - 1


def check(mask: fp.Mask, spans: dict[str, Spans], sizes: Lengths) -> bool:
    """Whoever knows the values. False: the mask or the batch goes another way."""
    parts = few_parts(as_run(mask, most_spans(spans))[0])
    if parts is None or not kernel.takes(parts, spans, sizes):
        return False
    most = traits(mask, spans, sizes).intervals
    wanted = row_bounds(mask, spans, sizes, tokens(sizes), most)
    unknown = {name: dataclasses.replace(own, host=None) for name, own in spans.items()}
    for own in (spans, unknown):
        made = kernel.composed_rows(parts, own, sizes, most)
        assert made.lo.dtype == made.hi.dtype == torch.int32
        assert torch.equal(made.lo, wanted.lo), mask
        assert torch.equal(made.hi, wanted.hi), mask
    return True


def as_spans(rng: random.Random, batch: Batch, names: frozenset[str]) -> dict[str, Spans]:
    """Unordered ones with unused rows among them, in tensors of any strides, some of them to come."""
    sets = {}
    for name in names:
        rows = []
        for _, keys in batch.seqlens:
            own = [*random_spans(rng, keys), *[(0, 0)] * rng.randint(0, 2)]
            if rng.random() < 0.3:
                own.append((keys + rng.randint(0, 9), rng.choice([keys + 20, INT32_MAX])))
            rng.shuffle(own)
            rows.append(own)
        width = max(map(len, rows))
        values = torch.tensor([own + [(0, 0)] * (width - len(own)) for own in rows], dtype=torch.int32)
        values = values.reshape(len(rows), width, 2)
        strided = torch.full((len(rows), 2 * width, 3), 5, dtype=torch.int32)[:, ::2, ::2]
        host = tuple(tuple(sorted(span for span in own if span != (0, 0))) for own in rows)
        sets[name] = Spans(strided.copy_(values) if rng.random() < 0.5 else values, host, INT32_MAX)
    return sets


def int32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def given(**sets: list[list[tuple[int, int]]]) -> dict[str, Spans]:
    return {
        name: Spans(int32(own).reshape(len(own), -1, 2), tuple(map(tuple, own)), INT32_MAX)
        for name, own in sets.items()
    }


MANY = causal & (window(9) | key_in("image"))

if INTERPRETED:

    @pytest.fixture(autouse=True)
    def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
        """The interpreter takes long for each, however many rows it has."""
        monkeypatch.setattr(kernel, "ROWS", 1024)

    @pytest.mark.parametrize("seed", range(10))
    def test_random_masks(seed: int) -> None:
        rng, count = random.Random(seed), 0
        while count < random_cases(20):
            mask, batch = random_expression(rng, depth=rng.choice([2, 3, 3, 4])), random_batch(rng, longest=400)
            count += check(mask, as_spans(rng, batch, mask.names), sizes_of(batch))

    @pytest.mark.parametrize("name", UGLY)
    def test_ugly_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()  # several programs
        rng, sizes = random.Random(name), sizes_of(UGLY[name])
        for mask in (MANY, key_outside("image") & window(40, 9) | query_in("image")):
            assert check(mask, as_spans(rng, UGLY[name], mask.names), sizes)

    def test_more_spans_than_are_looked_at_together() -> None:
        batch = Batch(((400, 400), (30, 400)), ((), ()))
        values = [[(at, at + 2) for at in range(0, 396, 4)][::-1]] * 2
        assert check(MANY, given(image=values), sizes_of(batch))

    def test_four_sets() -> None:
        mask = causal & (key_in("a") | key_outside("b") & prefix("c")) | same_span("d", before=3)
        values = {"a": [[(1, 4), (60, 66)]], "b": [[(9, 30)]], "c": [[(0, 5), (40, 41)]], "d": [[(50, 80), (80, 90)]]}
        assert check(mask, given(**values), sizes_of(Batch(((77, 100),), ((),))))

    def test_a_step_for_every_end_of_a_prefix() -> None:
        mask = (prefix("a") | prefix("b")) | (prefix("c") | prefix("d"))
        values = {name: [[(0, end)]] for name, end in zip("abcd", (3, 6, 9, 12), strict=True)}
        assert check(mask, given(**values), sizes_of(Batch(((5, 20),), ((),))))

    def test_more_queries_than_keys() -> None:
        sizes = Lengths(*map(int32, ([0, 70, 90], [0, 9, 9])), 90, 9, 70, 9, (70, 20), (9, 0), False, more_queries=True)
        for mask in (key_in("image"), everything, key_outside("image"), everything & key_outside("image")):
            assert check(mask, given(image=[[(2, 5)], [(0, 0)]]) if mask.names else {}, sizes)

    @pytest.mark.parametrize("keys", [INT32_MAX, INT32_MAX - 1, 2**31 - 100])
    def test_positions_up_to_the_largest(keys: int) -> None:
        sizes = Lengths(*map(int32, ([0, 60], [0, keys])), 60, keys, 60, keys, (60,), (keys,), same=False)
        last = keys - 70
        values = [[(0, 5), (2**30, 2**30 + 9), (last, last + 30), (last + 40, keys)]]
        spans = given(image=values, a=values)
        for mask in (
            MANY,
            causal & window(2**31 - 1) & key_outside("image"),
            window(2**40, 2**40) & key_in("image") | same_span("a", before=2**31 - 1),
            window(2**31 - 1, 2**31 - 1) | same_span("image", before=2**40),
            window(20, 2**31 - 2) & (one_block("image") | prefix("a")),
            window(9, 70) & key_outside("image") | query_in("a") & window(None, 2),
            everything,
        ):
            assert check(mask, {name: spans[name] for name in mask.names}, sizes)

    def test_what_the_torch_path_refuses_is_seen() -> None:
        """Of values that only the device knows: spans that the keys end within, which some masks look past."""
        refused = 0
        rng = random.Random(0)
        while refused < random_cases(20):
            mask = random_expression(rng, depth=2)
            batch = Batch(((40, 60),), ((),))
            span = (rng.randint(10, 59), rng.choice([60, 61, 90, INT32_MAX]))
            spans = {name: Spans(int32([[span, (2, 8)]]), None, INT32_MAX) for name in mask.names}
            sizes = sizes_of(batch)
            parts = few_parts(mask)
            assert parts is not None
            most = mask.count(most_spans(spans))
            if as_run(mask, most_spans(spans))[1] is not None:
                continue
            try:
                wanted = row_bounds(mask, spans, sizes, tokens(sizes), most)
            except fp.InputError:
                with pytest.raises(fp.InputError, match="no row sees keys outside"):
                    kernel.composed_rows(parts, spans, sizes, most)
                refused += 1
                continue
            made = kernel.composed_rows(parts, spans, sizes, most)
            assert torch.equal(made.lo, wanted.lo)
            assert torch.equal(made.hi, wanted.hi)

    def test_more_intervals_than_are_counted_are_seen() -> None:
        spans = {"image": Spans(int32([[(0, 2), (4, 6), (8, 9)]]), None, 9)}
        parts, sizes = few_parts(key_in("image")), sizes_of(Batch(((5, 60),), ((),)))
        assert parts is not None
        made = kernel.composed_rows(parts, spans, sizes, 3)
        assert made.lo.tolist() == [[0, 4, 8]] * 5
        with pytest.raises(fp.InputError, match="more intervals than the mask counts"):
            kernel.composed_rows(parts, spans, sizes, 2)

else:

    def test_what_is_too_much_goes_another_way() -> None:
        sizes = sizes_of(Batch(((40, 60),), ((),)))
        few, many = few_parts(MANY), few_parts(causal & (same_span("image") | key_in("a")))
        assert few is not None
        assert many is not None
        spans = given(image=[[(at, at + 1) for at in range(kernel.MOST_SPANS)]], a=[[]])
        assert kernel.takes(few, spans, sizes)
        assert kernel.takes(many, spans, sizes)
        spans["a"] = given(a=[[(1, 2)]])["a"]
        assert not kernel.takes(many, spans, sizes)
        long = dataclasses.replace(sizes, total_q=2**20)
        assert not kernel.takes(few, spans, long)
        assert kernel.takes(few, given(image=[[(1, 2)]]), long)
        for lengths in (
            dataclasses.replace(sizes, key_start=int32([0])),
            dataclasses.replace(sizes, query_start=int32([0])),
            dataclasses.replace(sizes, total_q=0),
        ):
            assert not kernel.takes(few, given(image=[[(1, 2)]]), lengths)

    def test_not_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor are the rows that tell copied: the graph would read memory that is others' by then."""
        batch = masked_batch(Batch(((40, 60),), ((),)), MANY, spans={"image": [[(3, 9)]]})
        batch = dataclasses.replace(batch, telling=TellingRows(batch.mask, batch.spans, batch.lengths))
        monkeypatch.setattr(MaskedBatch, "on_gpu", True)
        monkeypatch.setattr(kernel, "composed_rows", lambda *_: "launched")
        assert batch._composed() == "launched"
        assert batch._pieces() is not None
        monkeypatch.setattr(base, "is_capturing", lambda: True)
        assert batch._composed() is None
        assert batch._pieces() is None

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("checked", [True, False])
    @pytest.mark.parametrize("size", kernel.SIZES)
    def test_it_compiles_for_hopper(checked: bool, size: int) -> None:
        names = ("lo", "hi", "table", "cu_seqlens_q", "cu_seqlens_k", "ranges")
        pointers = dict.fromkeys(names, "*i32") | {"fine": "*i1" if checked else "*i32"}
        constants: dict[str, object] = {"ROWS": kernel.ROWS, "CHECKED": checked, "SIZE": size}
        constants |= kernel.CONSTANTS
        assert ".target sm_90" in compile_for_hopper(kernel.composed_rows_kernel, pointers, constants)
