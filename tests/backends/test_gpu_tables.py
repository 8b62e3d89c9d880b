"""What is planned in launches of our own on the GPU, against the torch path in every bit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fa4_prefixlm as fp
from fa4_prefixlm.backends.flex import tables_by_torch
from fa4_prefixlm.batch.lengths import as_one_sequence
from fa4_prefixlm.geometry.block_lists import packed_lists, varlen_lists
from fa4_prefixlm.geometry.intervals import row_bounds, tokens
from fa4_prefixlm.geometry.tiles import query_tiles, tile_map
from fa4_prefixlm.masks import causal, key_in, one_block, prefix, window
from fa4_prefixlm.masks.plain_parts import few_parts
from fa4_prefixlm.testing.batches import Batch, random_batch, random_spans
from fa4_prefixlm.testing.poison import poison_free_memory
from tests.backends.gpu_calls import MANY, OWN, Kind, many_spans, tensors_of
from tests.geometry.test_measured import random_expression
from tests.kernels.cases import same_lists

pytestmark = pytest.mark.gpu

FEW = causal & (window(60) | prefix("prompt") | key_in("image"))  # up to four intervals with two images


def plan_of(batch: Batch, mask: fp.Mask, spans: dict[str, list], backend: str) -> fp.Plan:
    q, k, v, _ = tensors_of(Kind((64, 64)), batch, 0)
    poison_free_memory()
    return fp.plan(spans, like=(q, k, v), mask=mask, backend=backend, cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k)


def rows_by_torch(plan: fp.Plan):
    """The bounds of the rows as the torch path has them, which the plan's own are in every bit."""
    rows = row_bounds(plan.mask, plan.spans, plan.lengths, tokens(plan.lengths), plan.traits.intervals)
    assert torch.equal(plan.bounds.lo, rows.lo)
    assert torch.equal(plan.bounds.hi, rows.hi)
    if rows.tags is None:
        assert plan.bounds.tags is None
    else:
        assert plan.bounds.tags is not None
        assert torch.equal(plan.bounds.tags.row_tag, rows.tags.row_tag)
        assert torch.equal(plan.bounds.tags.key_tag, rows.tags.key_tag)
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_tables_of_flex(seed: int) -> None:
    rng = random.Random(seed)
    batch = random_batch(rng, longest=1500)
    for mask, spans in (
        (fp.PrefixLM(rng.randint(1, 300)), {"image": batch.spans}),
        (causal | one_block("image"), {"image": batch.spans}),
        (MANY, many_spans(rng, batch, rng.randint(1, 30))),
        (OWN, many_spans(rng, batch, rng.randint(1, 30))),
    ):
        plan = plan_of(batch, mask, spans, "flex")
        rows_by_torch(plan)
        call = plan.prepared
        count, wanted, tiles = tables_by_torch(plan._batch, call.rows, call.keys, call.rule)
        assert count == call.intervals
        for name in ("ends", "of_keys", "row_tag", "key_tag", "counts", "full_counts"):
            mine, theirs = getattr(call.tables, name), getattr(wanted, name)
            assert mine is theirs is None or torch.equal(mine, theirs), (mask, name)
        for name in ("", "full_"):
            number = getattr(wanted, f"{name}counts").unsqueeze(3)
            theirs = getattr(wanted, f"{name}indices")
            theirs = torch.where(torch.arange(call.keys, device="cuda") < number, theirs, 0)
            assert torch.equal(getattr(call.tables, f"{name}indices"), theirs), (mask, name)
        assert torch.equal(call.key_tiles.is_full, tiles.is_full)
        assert torch.equal(call.key_tiles.is_partial, tiles.is_partial)


@pytest.mark.parametrize("seed", range(8))
def test_lists_of_fa4(seed: int) -> None:
    rng = random.Random(seed)
    batch = random_batch(rng, longest=1500)
    spans = {
        "image": [random_spans(rng, keys)[:2] for _, keys in batch.seqlens],
        "prompt": [((0, min(9, keys)),) if keys else () for _, keys in batch.seqlens],
    }
    for backend in ("varlen", "packed"):
        plan = plan_of(batch, FEW, spans, backend)
        bounds = rows_by_torch(plan)
        call, lengths, traits = plan.prepared, plan.lengths, plan.traits
        tile = call.lists.block_size
        assert not traits.banded
        if backend == "varlen":
            tiles = query_tiles(lengths, tile[0])
            seen = tile_map(bounds, tiles, lengths, tokens(lengths), *tile)
            wanted = varlen_lists(seen, tiles, lengths, traits, *tile)
        else:
            where, whole = tokens(lengths), as_one_sequence(lengths)
            shifted = bounds.shifted(where.key_offset)
            where = where._replace(sequence=torch.zeros_like(where.sequence))
            wanted = packed_lists(
                tile_map(shifted, query_tiles(whole, tile[0]), whole, where, *tile), lengths, traits, *tile
            )
        same_lists(call.lists, wanted)


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("seed", range(8))
def test_rows_in_a_launch(seed: int) -> None:
    """Of any mask of plain parts, and from the few rows that tell, against evaluating the mask at every row."""
    from fa4_prefixlm.kernels.pieces import all_rows

    rng, count = random.Random(seed), 0
    while count < 20:
        mask, batch = random_expression(rng), random_batch(rng, longest=1500)
        spans = {name: [list(random_spans(rng, keys)) for _, keys in batch.seqlens] for name in mask.names}
        try:
            plan = plan_of(batch, mask, spans, "reference")
        except fp.InputError:  # spans that the chunk would have to hold whole
            continue
        again = dataclasses.replace(plan._batch)  # nothing of it is made yet
        assert again.telling is not None
        assert again.telling.bounds.count > 0  # evaluated, however many rows tell
        with no_synchronisation():
            composed, pieces, bounds = again._composed(), again._pieces(), again.bounds
            from_pieces = None if pieces is None else all_rows(pieces, plan.lengths.total_q, plan.lengths.device)
        rows = rows_by_torch(plan)
        assert composed is not None or few_parts(mask) is None
        assert pieces is not None or plan.traits.tagged
        for own in (composed, from_pieces, bounds):
            assert own is None or torch.equal(own.lo, rows.lo), mask
            assert own is None or torch.equal(own.hi, rows.hi), mask
        count += 1


@pytest.mark.parametrize("seed", range(8))
def test_plans_of_values_on_the_device(seed: int) -> None:
    """Which the host does not know: planned without a synchronisation, unordered spans with unused rows among them."""
    rng, count = random.Random(seed), 0
    while count < 6:
        mask, batch = random_expression(rng), random_batch(rng, longest=1500)
        spans = {name: [random_spans(rng, keys) for _, keys in batch.seqlens] for name in mask.names}
        known = {name: [list(own) for own in sets] for name, sets in spans.items()}
        try:
            there = plan_of(batch, mask, known, "flex")
        except fp.InputError:
            continue
        on_device = {name: Batch(batch.seqlens, tuple(own)).ranges_tensor().cuda() for name, own in spans.items()}
        cu_q, cu_k = (torch.tensor(own, dtype=torch.int32, device="cuda") for own in (batch.cu_q, batch.cu_k))
        q, k, v, _ = tensors_of(Kind((64, 64)), batch, 0)
        make = functools.partial(
            fp.plan, on_device, like=(q, k, v), mask=mask, backend="flex", cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
        )
        make()  # compiles
        poison_free_memory()
        torch.cuda.synchronize()
        with no_synchronisation():
            plan = make()
        rows = rows_by_torch(plan)
        call = plan.prepared
        counted, wanted, _ = tables_by_torch(plan._batch, call.rows, call.keys, call.rule)
        assert counted == call.intervals == rows.count
        for name in ("ends", "of_keys", "row_tag", "key_tag", "counts", "full_counts"):
            mine, theirs = getattr(call.tables, name), getattr(wanted, name)
            assert mine is theirs is None or torch.equal(mine, theirs), (mask, name)
        for name in ("counts", "full_counts"):
            assert torch.equal(getattr(call.tables, name), getattr(there.prepared.tables, name)), (mask, name)
        count += 1


def test_spans_that_the_keys_end_within_are_seen_on_the_device() -> None:
    """In a process of its own: an assertion on the device ends its use of the GPU."""
    script = """
import torch, fa4_prefixlm as fp
from fa4_prefixlm.batch.ranges import Spans
from fa4_prefixlm.kernels.composed_rows import composed_rows
from fa4_prefixlm.masks import same_span
from fa4_prefixlm.masks.plain_parts import few_parts
cu = torch.tensor([0, 60], dtype=torch.int32, device="cuda")
from fa4_prefixlm.batch.lengths import Lengths
sizes = Lengths(cu, cu, 60, 60, 60, 60, (60,), (60,), True)
spans = {"image": Spans(torch.tensor([[[50, 70]]], dtype=torch.int32, device="cuda"), None, 60)}
composed_rows(few_parts(same_span("image")), spans, sizes, 1)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "assert" in done.stderr


@pytest.mark.parametrize("mask", [causal & (window(256) | key_in("image")), causal | one_block("image")], ids=str)
def test_a_plan_launches_little_for_many_intervals(mask: fp.Mask) -> None:
    """A mask of many intervals a row is planned in few operations on the GPU: torch evaluates no row there."""
    tokens = 4096
    q = torch.empty(tokens, 2, 64, dtype=torch.bfloat16, device="cuda")
    cu = [0, tokens]
    images = {"image": [[(at, at + 64) for at in range(0, tokens, 512)]]}
    counted = Counted()
    for _ in range(2):  # the first compiles
        counted = Counted()
        with counted:
            plan = fp.plan(images, like=(q, q, q), cu_seqlens_q=cu, cu_seqlens_k=cu, mask=mask, backend="flex")
    assert plan.traits.intervals > 4 or plan.traits.tagged
    assert counted.on_device < 30


class Counted(TorchDispatchMode):
    """Counts operations that make or take a tensor on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [own for own in tree_leaves((result, args)) if isinstance(own, torch.Tensor)]
        self.on_device += any(own.is_cuda for own in made)
        return result
