"""Keys in pages on the GPU: every backend against fp64, pages in random order among pages of NaN."""

from __future__ import annotations

import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.testing.accuracy import exact_attention
from fa4_prefixlm.testing.batches import UGLY, Batch, masks_for, mixed_batch, random_batch, random_mask
from tests.backends.gpu_calls import (
    BACKENDS,
    TYPICAL_BAND,
    Kind,
    causal_band,
    limit,
    measured,
    run,
    tensors_of,
)
from tests.exactness import assert_exact, assert_within

pytestmark = pytest.mark.gpu

KINDS = [
    Kind((64, 64)),
    Kind((128, 128)),
    Kind((192, 128)),
    Kind((256, 256)),
    Kind((256, 256), torch.float16, (6, 1)),
    Kind((128, 128), torch.bfloat16, (6, 2), softcap=30.0, sink=True),
]

PAGE_SIZES = (16, 64, 80, 128, 1)


def poison_shared_memory(kind: Kind) -> None:
    """Leave NaN in the shared memory of every SM: a kernel that multiplies what it did not load by 0 shows it."""
    nothing = [
        torch.full((20000, heads, dim), float("nan"), device="cuda", dtype=kind.dtype)
        for heads, dim in ((kind.heads[0], kind.dims[0]), (kind.heads[1], kind.dims[0]), (kind.heads[1], kind.dims[1]))
    ]
    fp.attention(
        *nothing, [[]], cu_seqlens_q=[0, 20000], cu_seqlens_k=[0, 20000], mask=fp.PrefixLM(64), backend="native"
    )


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_batches(kind: Kind, page_size: int, gpu_report) -> None:
    for seed in range(5):
        rng = random.Random(f"{kind}{page_size}{seed}")
        batch, mask = random_batch(rng, longest=900), random_mask(rng)
        q, k, v, options = tensors_of(kind, batch, seed)
        band = causal_band(q, k, v, batch, mask.window, options)
        for backend in (*BACKENDS, *["flex"] * (kind.dims == (128, 128)), "reference"):
            poison_shared_memory(kind)
            found = run(kind, batch, mask, backend, seed, device_inputs=rng.random() < 0.5, page_size=page_size)
            gpu_report(
                kind=str(kind),
                seed=seed,
                backend=f"{backend}, pages of {page_size}",
                mask=str(mask),
                **measured(found, band),
            )
            assert_within(found, limit(backend, kind, band), f"seed {seed}, {backend}, {mask}, {batch}")


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("name", UGLY)
def test_ugly_batches(name: str, dim: int, gpu_report) -> None:
    batch, kind = UGLY[name], Kind((dim, dim))
    for mask in masks_for(batch):
        for backend in ("native", "varlen", "two_pass"):
            found = run(kind, batch, mask, backend, 3, page_size=16)
            gpu_report(
                kind=str(kind),
                batch=name,
                backend=f"{backend}, pages of 16",
                mask=str(mask),
                **measured(found, TYPICAL_BAND),
            )
            assert_within(found, limit(backend, kind, TYPICAL_BAND), f"{backend}, {mask}")


@pytest.mark.parametrize("kind", [Kind((128, 128)), Kind((256, 256), torch.bfloat16, (16, 8))], ids=str)
def test_mixed_batches_with_decode_rows(kind: Kind, gpu_report) -> None:
    for seed in range(12):
        rng = random.Random(f"mixed{kind}{seed}")
        batch, mask = mixed_batch(rng), random_mask(rng)
        for backend in ("native", "varlen", "two_pass", "auto"):
            found = run(kind, batch, mask, backend, seed, device_inputs=seed % 2 == 1, page_size=16)
            gpu_report(
                kind=str(kind),
                seed=seed,
                backend=f"{backend}, mixed",
                mask=str(mask),
                **measured(found, TYPICAL_BAND),
            )
            assert_within(found, limit(backend, kind, TYPICAL_BAND), f"seed {seed}, {backend}, {mask}, {batch}")


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("window", [None, 90])
def test_text_only_and_decode_take_fa4s_own_call(page_size: int, window: int | None) -> None:
    batch = Batch(((300, 300), (1, 500), (200, 600)), ((), ((3, 60),), ((0, 400), (700, 800))))
    q, k, v = batch.tensors((4, 2), (128, 128), torch.bfloat16, "cuda", 0)
    pages = batch.in_pages(k, v, page_size, 1)
    mask = fp.PrefixLM(window)
    plan = fp.plan(
        batch.spans,
        like=(q, pages.k, pages.v),
        cu_seqlens_q=batch.cu_q,
        seqused_k=batch.as_seqlens[1],
        page_table=pages.table,
        mask=mask,
    )
    assert plan.choice.name == "causal"
    exact, exact_lse = exact_attention(q, k, v, mask=mask, spans=batch.spans, seqlens=batch.as_seqlens)
    out, lse = fp.attention(q, pages.k, pages.v, plan, return_lse=True)
    assert_exact(out, exact, lse, exact_lse)


@pytest.mark.parametrize("backend", ["native", "varlen", "packed", "two_pass"])
def test_pages_do_not_synchronise(backend: str) -> None:
    batch = Batch(((300, 300), (100, 260)), (((4, 260),), ((0, 100), (200, 256))))
    q, k, v = batch.tensors((4, 2), (128, 128), torch.bfloat16, "cuda", 0)
    pages = batch.in_pages(k, v, 16, 1)
    cu_q, used = (torch.tensor(values, dtype=torch.int32, device="cuda") for values in (batch.cu_q, (300, 260)))
    table, ranges = pages.table.cuda(), batch.ranges_tensor().cuda()

    def call():
        plan = fp.plan(
            ranges,
            like=(q, pages.k, pages.v),
            cu_seqlens_q=cu_q,
            seqused_k=used,
            page_table=table,
            mask=fp.PrefixLM(100),
            backend=backend,
        )
        return fp.attention(q, pages.k, pages.v, plan)

    warm = call()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(out, warm)


def test_head_dims_that_fa4_does_not_read_from_pages_are_gathered() -> None:
    batch = Batch(((300, 300),), (((4, 260),),))
    q, k, v = batch.tensors((4, 2), (72, 72), torch.bfloat16, "cuda", 0)
    pages = batch.in_pages(k, v, 16, 1)
    plan = fp.plan(
        batch.spans, like=(q, pages.k, pages.v), cu_seqlens_q=[0, 300], seqused_k=[300], page_table=pages.table
    )
    assert (plan.choice.name, plan.choice.gathered) == ("native", True)
    exact, exact_lse = exact_attention(q, k, v, mask=fp.PrefixLM(), spans=batch.spans, seqlens=batch.as_seqlens)
    out, lse = fp.attention(q, pages.k, pages.v, plan, return_lse=True)
    assert_exact(out, exact, lse, exact_lse)
