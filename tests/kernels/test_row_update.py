"""The launch that fills a serving plan, in Triton's interpreter on the CPU, against the torch path bit for bit.

Whether Triton interprets is settled at its import, so `test_in_the_interpreter` runs this file again in a process of
its own; there the interpreted tests are collected and the compiling ones are not.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from fa4_prefixlm.testing.batches import EDGES, UGLY, Batch, random_batch
from fa4_prefixlm.testing.stages import prepare
from tests.kernels.cases import MASKS, TILES, TWO_SETS, spans_of
from tests.kernels.triton_processes import INTERPRETED, compile_for_hopper, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")
from fa4_prefixlm import InputError, Mask, PrefixLM
from fa4_prefixlm.batch.ranges import HostSpans
from fa4_prefixlm.geometry import tiles as tiling
from fa4_prefixlm.kernels import row_update
from fa4_prefixlm.kernels.row_update import RowBuffers, update_rows
from fa4_prefixlm.masks import causal, query_in, window
from fa4_prefixlm.masks.closed_form import closed_form

GUARD, POISON = 64, -7654321


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a guard of poison before and after them."""
    poison = POISON if tensor.dtype == torch.int32 else True
    whole = torch.full((tensor.numel() + 2 * GUARD,), poison, dtype=tensor.dtype)
    inside = whole[GUARD : GUARD + tensor.numel()]
    inside.copy_(tensor.flatten())
    return inside.view(tensor.shape)


def guards_are_whole(tensor: torch.Tensor) -> bool:
    poison = POISON if tensor.dtype == torch.int32 else True
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return bool((storage[:GUARD] == poison).all() and (storage[-GUARD:] == poison).all())


PAGES = 700
TENSORS = ("bounds", "tiles", "cu_seqlens_q", "seqused_k", "page_table", "fine")


def allocate(max_tokens: int, max_sequences: int, tile: tuple[int, int]) -> RowBuffers:
    buffers = RowBuffers.allocate(max_tokens, max_sequences, *tile, PAGES, device="cpu", padding=8)
    return dataclasses.replace(buffers, **{name: guarded(getattr(buffers, name)) for name in TENSORS})


def int32(values) -> torch.Tensor:
    return guarded(torch.tensor(values, dtype=torch.int32))


def ranges_of(rng: random.Random, batch: Batch, spans: HostSpans, width: int = 0) -> torch.Tensor:
    """The spans with spans that are not here yet, in any order and in one of several strides."""
    rows = []
    for (_, keys), own in zip(batch.seqlens, spans, strict=True):
        pending = [(keys + start, keys + start + rng.randint(1, 99)) for start in (0, 7) if rng.random() < 0.3]
        rows.append([*own, *pending])
    width = max(width, *(len(own) for own in rows))
    for own in rows:
        own += [(0, 0)] * (width - len(own))
        rng.shuffle(own)
    values = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), width, 2)
    kind = rng.randrange(3)
    if kind == 0:
        return guarded(values)
    if kind == 1:
        return guarded(values.permute(2, 1, 0)).permute(2, 1, 0)
    return guarded(torch.nn.functional.pad(values, (1, 0), value=POISON))[:, :, 1:]


def check(rng: random.Random, batch: Batch, mask: Mask, tile: tuple[int, int]) -> None:
    form = closed_form(mask)
    total, count = batch.cu_q[-1], len(batch.seqlens)
    buffers = allocate(total + rng.choice([0, 0, 1, 300]), count + rng.choice([0, 0, 1, 5]), tile)
    spans = spans_of(rng, batch, mask)
    ranges = [ranges_of(rng, batch, spans[own.span], rng.choice([0, 0, 40])) for own in form.inside]
    for left_over in (buffers.tiles, buffers.cu_seqlens_q, buffers.seqused_k, buffers.page_table):
        left_over.fill_(POISON)
    pages = int32([[rng.randrange(1000) for _ in range(width)] for width in [rng.choice([1, 255, 257, PAGES])] * count])
    update_rows(form, buffers, int32(batch.cu_q), int32(batch.as_seqlens[1]), ranges, page_table=pages)
    compare(batch, mask, buffers, spans)
    assert torch.equal(buffers.page_table[:count, : pages.shape[1]], pages)
    assert (buffers.page_table[count:] == POISON).all()
    assert (buffers.page_table[:, pages.shape[1] :] == POISON).all()
    assert all(guards_are_whole(getattr(buffers, name)) for name in TENSORS)


def compare(batch: Batch, mask: Mask, buffers: RowBuffers, spans: dict[str, HostSpans]) -> None:
    total, count = batch.cu_q[-1], len(batch.seqlens)
    stage = prepare(batch, mask, spans)
    assert torch.equal(buffers.bounds[:total], torch.cat([stage.bounds.lo, stage.bounds.hi], dim=1))
    assert (buffers.bounds[total:] == 0).all()
    tiles = tiling.query_tiles(stage.sizes, buffers.tile_tokens)
    runs = tiling.tile_runs(stage.bounds, tiles, buffers.tile_tokens, buffers.tile_n)
    wanted = tiling.tile_slots(runs, tiles, stage.sizes, buffers.tile_tokens)
    assert torch.equal(buffers.tiles[: len(wanted)], wanted)
    assert not buffers.tiles[len(wanted) :].any()
    unused = buffers.max_sequences - count
    assert buffers.cu_seqlens_q.tolist() == batch.cu_q + [total] * unused
    assert buffers.seqused_k.tolist() == [*batch.as_seqlens[1], *[0] * unused]
    assert buffers.fine.all()


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

    @pytest.mark.parametrize("missing", [0, 1])
    def test_one_of_two_sets_may_have_no_spans(self, missing: int) -> None:
        batch, mask = Batch(((90, 100), (40, 40)), ((), ())), TWO_SETS[1]
        own = (((60, 80),), ((3, 9),))
        spans = {own_set: () if index == missing else own for index, own_set in enumerate(("canvas", "image"))}
        given = [None if index == missing else int32(own) for index in range(2)]
        buffers = allocate(130, 2, (64, 64))
        update_rows(closed_form(mask), buffers, int32(batch.cu_q), int32(batch.as_seqlens[1]), given)
        compare(batch, mask, buffers, {name: used or ((), ()) for name, used in spans.items()})

    def test_spans_of_one_set_may_not_share_a_row_but_those_of_two_may(self) -> None:
        form, buffers = closed_form(TWO_SETS[0]), allocate(100, 1, (64, 64))
        lengths = {"cu_seqlens_q": int32([0, 90]), "seqused_k": int32([90])}
        one, two = int32([[(10, 40), (50, 60)]]), int32([[(30, 55), (70, 80)]])
        update_rows(form, buffers, **lengths, ranges=(one, two))
        assert buffers.bounds[35].tolist() == [0, 55]
        for cut in ((int32([[(70, 91)]]), two), (one, int32([[(70, 91)]]))):
            with pytest.raises(InputError):
                update_rows(form, buffers, **lengths, ranges=cut)
        for shared in ((int32([[(10, 40), (39, 60)]]), two), (one, int32([[(30, 55), (54, 80)]]))):
            with pytest.raises(InputError):
                update_rows(form, buffers, **lengths, ranges=shared)

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
        batch = Batch(((400, 400), (30, 400)), (spans[::-1], spans[:-11]))
        check(random.Random(0), batch, PrefixLM(50, clamp=False), (128, 64))

    def test_many_sequences(self) -> None:
        batch = Batch(((1, 3), (0, 2), (2, 2)) * 9, (((0, 2),), (), ()) * 9)
        check(random.Random(0), batch, PrefixLM(), (64, 64))

    def test_no_sequences_and_no_tokens(self) -> None:
        form = closed_form(PrefixLM())
        for batch in (0, 2):
            buffers = allocate(100, 3, (64, 64))
            update_rows(form, buffers, int32([0] * (batch + 1)), seqused_k=int32([0, 9][:batch]))
            assert not buffers.tiles.any()
            assert not buffers.cu_seqlens_q.any()
            assert buffers.seqused_k.tolist() == [0, 9 * (batch == 2), 0]
            assert buffers.fine.all()

    @pytest.mark.parametrize("window_tokens", [2**31 - 1, 2**40])
    def test_a_window_wider_than_int32_is_no_window(self, window_tokens: int) -> None:
        check(random.Random(0), UGLY["span at both borders"], PrefixLM(window_tokens), (128, 128))

    def test_spans_may_overlap_where_no_query_is(self) -> None:
        buffers = allocate(100, 1, (64, 64))
        ranges = int32([[(0, 50), (30, 60), (70, 80), (200, 300), (250, 260)]])
        update_rows(closed_form(PrefixLM()), buffers, int32([0, 40]), seqused_k=int32([100]), ranges=(ranges,))
        assert buffers.bounds[9:11, 1].tolist() == [70, 80]

    @pytest.mark.parametrize(
        ("cu_q", "keys", "spans"),
        [
            ([1, 40, 90], [60, 60], None),
            ([-1, 40, 90], [60, 60], None),
            ([0, 50, 40], [60, 60], None),
            ([0, 2**31 - 1, 90], [60, 60], None),
            ([0, -(2**31), 90], [60, 60], None),
            ([0, 40, 101], [60, 80], None),
            ([0, 40, 2**31 - 1], [60, 2**31 - 1], None),
            ([0, 40, 90], [39, 60], None),
            ([0, 40, 90], [60, -1], None),
            ([0, 0, 90], [-1, 90], None),
            ([0, 0, 0], [-(2**31), 0], None),
            ([0, 40, 90], [60, 60], [[(5, 5)], [(0, 0)]]),
            ([0, 40, 90], [60, 60], [[(0, 0)], [(9, 5)]]),
            ([0, 40, 90], [60, 60], [[(0, 0), (0, 0)], [(0, 0), (-1, 5)]]),
            ([0, 40, 90], [60, 60], [[(0, 0)], [(0, -5)]]),
            ([0, 40, 90], [60, 60], [[(0, 0)], [(40, 61)]]),
            ([0, 40, 90], [60, 60], [[(-(2**31), 2**31 - 1)], [(0, 0)]]),
            ([0, 40, 90], [60, 60], [[(70, 65)], [(0, 0)]]),
            ([0, 40, 90], [60, 60], [[(0, 0), (0, 0)], [(11, 31), (30, 40)]]),
            ([0, 40, 90], [60, 60], [[(5, 60), (59, 60)], [(0, 0), (0, 0)]]),
            ([0, 40, 90], [60, 60], [[(30, 40), (30, 40)], [(0, 0), (0, 0)]]),
        ],
        ids=str,
    )
    def test_bad_values_are_seen_and_do_no_harm(self, cu_q, keys, spans) -> None:
        buffers = allocate(100, 3, (64, 64))
        ranges = () if spans is None else (int32(spans),)
        with pytest.raises(InputError):
            update_rows(closed_form(PrefixLM(20)), buffers, int32(cu_q), seqused_k=int32(keys), ranges=ranges)
        assert buffers.fine.all()  # the next batch begins anew
        assert all(guards_are_whole(getattr(buffers, name)) for name in TENSORS)
        assert (buffers.bounds[100:] == 0).all()
        assert (buffers.bounds >= 0).all()
        assert (buffers.bounds <= max(0, *keys)).all()
        assert (buffers.cu_seqlens_q >= 0).all()
        assert (buffers.cu_seqlens_q <= 100).all()
        assert (buffers.seqused_k >= 0).all()

    def test_rows_and_keys_have_their_own_limits(self) -> None:
        form, buffers = closed_form(PrefixLM()), allocate(100, 3, (64, 64))
        lengths = {"cu_seqlens_q": int32([0, 40, 90]), "seqused_k": int32([60, 70])}
        update_rows(form, buffers, **lengths, max_rows=90, max_keys=70)
        for limit in ({"max_rows": 89}, {"max_keys": 69}):
            with pytest.raises(InputError):
                update_rows(form, buffers, **lengths, **limit)
            assert buffers.cu_seqlens_q.max() <= limit.get("max_rows", 90)
            assert buffers.seqused_k.max() <= limit.get("max_keys", 70)

    def test_arguments(self) -> None:
        buffers, form = allocate(100, 2, (64, 64)), closed_form(PrefixLM())
        cu, used = int32([0, 5]), int32([5])
        for message, arguments, given in (
            ("at most the plan's 2 sequences", (form, buffers, int32([0, 1, 2, 3])), {"seqused_k": int32([1, 1, 1])}),
            ("dtype torch.int32", (form, buffers, cu.long()), {"seqused_k": used}),
            (r"shape \(1,\)", (form, buffers, cu), {"seqused_k": int32([5, 5])}),
            (r"shape \(1, 1, 2\)", (form, buffers, cu), {"seqused_k": used, "ranges": [int32([[(0, 1)]] * 2)]}),
            ("those of 0 sets", (closed_form(causal), buffers, cu), {"seqused_k": used, "ranges": [int32([[(0, 1)]])]}),
        ):
            with pytest.raises(InputError, match=message):
                update_rows(*arguments, **given)


class TestCompiled:
    __test__ = not INTERPRETED

    @pytest.mark.slow
    def test_in_the_interpreter(self) -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize(
        "mask", [PrefixLM(), PrefixLM(9, clamp=False), window(9, 3) | query_in("a"), TWO_SETS[1]], ids=str
    )
    def test_compiles_for_hopper(self, mask: Mask) -> None:
        constants = {**row_update.constants(closed_form(mask), 42, 80), "PAGES_AT_ONCE": row_update.PAGES_AT_ONCE}
        pointers = dict.fromkeys((*TENSORS, "own_cu_seqlens_q", "own_seqused_k", "own_page_table", "ranges"), "*i32")
        pointers["fine"] = "*i1"
        assert ".target sm_90" in compile_for_hopper(row_update.update_rows_kernel, pointers, constants)
