"""The launch that makes a plan's rows, in Triton's interpreter on the CPU, against the torch path bit for bit.

Run in a process of its own, as `test_row_update.py` is.
"""

from __future__ import annotations

import dataclasses
import random
from unittest import mock

import pytest
import torch

from fa4_prefixlm.testing.batches import EDGES, UGLY, Batch, random_batch
from fa4_prefixlm.testing.stages import prepare
from tests.kernels.cases import MASKS, TILES, TWO_SETS, spans_of
from tests.kernels.triton_processes import INTERPRETED, compile_for_hopper, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")
from fa4_prefixlm import InputError, Mask, PrefixLM
from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.backends.rows import kernel_rows
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.ranges import NamedRanges, Spans
from fa4_prefixlm.batch.tensors import describe
from fa4_prefixlm.fa4.kernels.launch import PADDING
from fa4_prefixlm.kernels import row_update
from fa4_prefixlm.masks import causal, query_in, window
from fa4_prefixlm.masks.closed_form import closed_form


def masked_batch(batch: Batch, mask: Mask, *, paged: bool = False, spans: NamedRanges = None) -> MaskedBatch:
    """A batch as `plan_for` hands it to a backend, whose values the host knows. spans: None: the batch's own."""
    stage = prepare(batch, mask, spans or (batch.spans if mask.names else {}))
    sizes, spec = stage.sizes, describe(*batch.tensors((4, 2), (16, 16), torch.bfloat16, "cpu"))
    keys = Keys.contiguous(sizes)
    if paged:
        sizes = dataclasses.replace(sizes, exact_total_k=False)
        keys = Keys(sizes.max_seqlen_k, seqused_k=sizes.cu_seqlens_k.diff(), page_table=torch.zeros(1, 1).int())
    return MaskedBatch(spec, mask, stage.spans, sizes, stage.traits, keys)


def on_device_only(batch: MaskedBatch) -> MaskedBatch:
    """The same, as if the host did not know the values."""
    lengths = dataclasses.replace(batch.lengths, seqlens_q=None, seqlens_k=None)
    spans = {name: dataclasses.replace(own, host=None) for name, own in batch.spans.items()}
    return dataclasses.replace(batch, lengths=lengths, spans=spans)


def check(rng: random.Random, batch: Batch, mask: Mask, tile: tuple[int, int]) -> None:
    """Both ways to fill the rows agree in every bit, whoever knows the values, wherever the keys are."""
    given = masked_batch(batch, mask, paged=rng.random() < 0.5, spans=spans_of(rng, batch, mask))
    bounds, tiles = kernel_rows(given, *tile)
    for source in (given, on_device_only(given)):
        one = kernel_rows(dataclasses.replace(source, in_one_launch=True), *tile)
        assert torch.equal(one.bounds, bounds)
        assert torch.equal(one.tiles, tiles)


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("seed", range(16))
    def test_random_batches(self, seed: int) -> None:
        rng = random.Random(seed)
        check(rng, random_batch(rng, longest=400), MASKS[seed % len(MASKS)], TILES[seed % len(TILES)])

    @pytest.mark.parametrize("seed", range(12))
    def test_two_sets(self, seed: int) -> None:
        rng = random.Random(seed)
        check(rng, random_batch(rng, longest=400), TWO_SETS[seed % len(TWO_SETS)], TILES[seed % len(TILES)])

    def test_each_set_has_its_own_longest_span(self) -> None:
        given = masked_batch(
            Batch(((90, 90),), ((),)), TWO_SETS[0], spans={"canvas": [[(0, 40)]], "image": [[(50, 60)]]}
        )
        form = closed_form(TWO_SETS[0])
        sets = [given.spans[own.span] for own in form.inside]
        for longest in ((40, 10), (39, 10), (40, 9)):
            spans = [dataclasses.replace(own, host=None, longest=n) for own, n in zip(sets, longest, strict=True)]
            if longest == (40, 10):
                row_update.plan_rows(form, given.lengths, given.keys, spans, 64, 80, padding=8)
                continue
            with pytest.raises(InputError, match="max_range"):
                row_update.plan_rows(form, given.lengths, given.keys, spans, 64, 80, padding=8)

    @pytest.mark.parametrize("name", UGLY)
    def test_ugly_batches(self, name: str) -> None:
        rng = random.Random(name)
        mask = PrefixLM(rng.choice([None, 1, 50, 100]), clamp=rng.random() < 0.5)
        check(rng, UGLY[name], mask, rng.choice(TILES[:2]))

    @pytest.mark.parametrize("clamp", [True, False])
    def test_decode_rows(self, clamp: bool) -> None:
        keys = [edge for edge in EDGES if edge < 100]
        batch = Batch(tuple((1, count) for count in keys), tuple(((count // 2, count),) for count in keys))
        check(random.Random(0), batch, PrefixLM(70, clamp=clamp), (42, 80))

    def test_many_spans(self) -> None:
        spans = tuple((start, start + 2) for start in range(0, 399, 3))
        check(random.Random(0), Batch(((400, 400), (30, 400)), (spans[::-1], spans[:-11])), PrefixLM(50), (128, 64))

    @pytest.mark.parametrize("paged", [True, False])
    def test_spans_ahead_of_the_keys(self, paged: bool) -> None:
        batch = Batch(((40, 60), (5, 90)), (((3, 9), (50, 60)), ((85, 90),)))
        given = masked_batch(batch, PrefixLM(20), paged=paged)
        ahead = torch.tensor([[[50, 60], [60, 70], [3, 9]], [[200, 300], [85, 90], [0, 0]]], dtype=torch.int32)
        later = dataclasses.replace(given, spans={"image": Spans(ahead, None, 100)})
        for tile in TILES:
            one = kernel_rows(dataclasses.replace(later, in_one_launch=True), *tile)
            assert all(map(torch.equal, one, kernel_rows(later, *tile)))
            assert all(map(torch.equal, one, kernel_rows(given, *tile)))

    @pytest.mark.parametrize("mask", [causal & window(9), window(9) | query_in("image"), PrefixLM(9)], ids=str)
    def test_a_span_may_be_cut_where_the_mask_says_so(self, mask: Mask) -> None:
        """What the launch refuses is what `Mask.whole` says."""
        given = masked_batch(Batch(((40, 60),), (((3, 9),),)), mask)
        form, cut = closed_form(mask), Spans(torch.tensor([[[50, 70]]], dtype=torch.int32), None, 100)
        for own in form.inside:
            assert mask.whole(own.span) == "span"
            with pytest.raises(InputError):
                row_update.plan_rows(form, given.lengths, given.keys, [cut], 64, 80, padding=8)

    def test_rows_past_the_last_sequence(self) -> None:
        """`cu_seqlens_q` that ends before the tensor does is refused, as on the torch path: none is left unwritten."""
        given = on_device_only(masked_batch(Batch(((40, 60), (0, 0), (5, 90)), (((50, 60),), (), ())), PrefixLM()))
        longer = dataclasses.replace(given, lengths=dataclasses.replace(given.lengths, total_q=300))
        with pytest.raises(InputError):
            kernel_rows(dataclasses.replace(longer, in_one_launch=True), 64, 80)

    def test_rows_after_the_last_are_zero(self) -> None:
        given = masked_batch(Batch(((40, 60), (5, 90)), (((50, 60),), ())), PrefixLM())
        filled = torch.full
        with mock.patch.object(torch, "empty", lambda *shape, **kinds: filled(shape, 7, **kinds)):
            bounds, _ = kernel_rows(dataclasses.replace(given, in_one_launch=True), 64, 80)
        assert bounds.shape[0] == 45 + PADDING
        assert not bounds[45:].any()

    @pytest.mark.parametrize(
        ("cu_q", "cu_k", "spans"),
        [
            ([1, 40, 90], [0, 60, 120], None),
            ([0, 50, 40], [0, 60, 120], None),
            ([0, 40, 89], [0, 60, 120], None),
            ([0, 2**31 - 1, 90], [0, 60, 120], None),
            ([0, -(2**31), 90], [0, 60, 120], None),
            ([0, 40, 90], [0, 39, 120], None),
            ([0, 40, 90], [0, 60, 119], None),
            ([0, 40, 90], [1, 60, 120], None),
            ([0, 40, 90], [0, 121, 120], None),
            ([0, 5, 90], [0, 25, 120], None),
            ([0, 40, 90], [0, 60, 120], [[(5, 5)], [(0, 0)]]),
            ([0, 40, 90], [0, 60, 120], [[(0, 0)], [(9, 5)]]),
            ([0, 40, 90], [0, 60, 120], [[(0, 0)], [(-1, 5)]]),
            ([0, 40, 90], [0, 60, 120], [[(0, 0)], [(40, 61)]]),
            ([0, 40, 90], [0, 60, 120], [[(10, 41)], [(0, 0)]]),
            ([0, 40, 90], [0, 60, 120], [[(20, 31), (30, 40)], [(0, 0), (0, 0)]]),
        ],
        ids=str,
    )
    def test_bad_values_on_the_device_are_seen(self, cu_q, cu_k, spans) -> None:
        """Rows at most 60, keys at most 80, spans at most 30 tokens."""

        def rows(cu_q, cu_k, spans) -> torch.Tensor:
            sizes = Lengths(
                torch.tensor(cu_q, dtype=torch.int32),
                torch.tensor(cu_k, dtype=torch.int32),
                total_q=90,
                total_k=120,
                max_seqlen_q=60,
                max_seqlen_k=80,
                seqlens_q=None,
                seqlens_k=None,
                same=False,
            )
            ranges = torch.zeros(2, 0, 2) if spans is None else torch.tensor(spans)
            own = Spans(ranges.to(torch.int32), None, 30)
            form = closed_form(PrefixLM(20))
            return row_update.plan_rows(form, sizes, Keys.contiguous(sizes), [own], 64, 80, padding=8)[0]

        rows([0, 40, 90], [0, 60, 120], [[(20, 30), (30, 40)], [(0, 30), (0, 0)]])
        with pytest.raises(InputError, match="max_range"):
            rows(cu_q, cu_k, spans)


class TestCompiled:
    __test__ = not INTERPRETED

    @pytest.mark.slow
    def test_in_the_interpreter(self) -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("checked", [True, False])
    @pytest.mark.parametrize("cumulative", [True, False])
    def test_compiles_for_hopper(self, checked: bool, cumulative: bool) -> None:
        constants = row_update.constants(closed_form(PrefixLM(9, clamp=False)), 42, 80)
        flags = {"PADDING": PADDING, "CHECKED": checked, "CUMULATIVE": cumulative}
        pointers = dict.fromkeys(("bounds", "tiles", "cu_seqlens_q", "counts", "ranges"), "*i32")
        pointers["fine"] = "*i1" if checked else "*i32"
        kernel = row_update.plan_rows_kernel
        assert ".target sm_90" in compile_for_hopper(kernel, pointers, {**constants, **flags})
