"""Serving plans on the GPU: updates in place, without a synchronisation, under captured CUDA graphs."""

from __future__ import annotations

import dataclasses
import importlib
import random
import subprocess
import sys

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.geometry.traits import text_only
from fa4_prefixlm.masks import causal, diffusion_gemma, prefix, same_span, window
from fa4_prefixlm.testing.accuracy import exact_attention
from fa4_prefixlm.testing.batches import Batch, mixed_batch
from fa4_prefixlm.testing.pages import ShuffledPages
from tests.exactness import assert_exact

pytestmark = pytest.mark.gpu

plan_module = importlib.import_module("fa4_prefixlm.runtime.serving_plans")  # `fp.plan` is the function

MASKS = [fp.PrefixLM(), fp.PrefixLM(100), fp.PrefixLM(100, clamp=False)]
ENCODER = window(100, 40) | same_span("image")
TOKENS, SEQUENCES, PAGES_PER_SEQUENCE, PAGE = 12000, 16, 128, 16


def a_batch(seed: int, kind: str = "mixed") -> Batch:
    rng = random.Random(f"serving{seed}")
    batch = mixed_batch(rng)
    return Batch(batch.seqlens, ((),) * len(batch.spans)) if kind == "text" else batch


def on_device(batch: Batch, pages: ShuffledPages, ranges: bool = True) -> dict[str, object]:
    cu_q, used = (torch.tensor(values, dtype=torch.int32).cuda() for values in (batch.cu_q, batch.as_seqlens[1]))
    where = {"cu_seqlens_q": cu_q, "seqused_k": used, "page_table": pages.table.cuda(), "total_q": batch.cu_q[-1]}
    return {**where, "ranges": batch.ranges_tensor().cuda()} if ranges else where


def serving_plan(mask: fp.Mask, dim: int = 128, heads: tuple[int, int] = (4, 2)) -> fp.ServingPlan:
    q, k, v = (
        torch.empty(1, *shape, dim, dtype=torch.bfloat16, device="cuda")
        for shape in ((heads[0],), (PAGE, heads[1]), (PAGE, heads[1]))
    )
    return fp.serving_plan(
        like=(q, k, v), max_tokens=TOKENS, max_sequences=SEQUENCES, max_pages=PAGES_PER_SEQUENCE, mask=mask
    )


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("mask", [*MASKS, ENCODER], ids=str)
def test_an_updated_plan_is_a_new_plan_bit_for_bit(mask: fp.Mask, dim: int) -> None:
    serving = serving_plan(mask, dim)
    assert serving.in_place
    for seed in range(10):
        batch = a_batch(seed, "text" if seed == 7 else "mixed")
        q, k, v = batch.tensors((4, 2), (dim, dim), torch.bfloat16, "cuda", seed)
        pages = batch.in_pages(k, v, PAGE, seed)
        if seed % 2:
            serving.update(**on_device(batch, pages))
        else:
            spans = [list(own) for own in batch.spans]
            serving.update(spans, cu_seqlens_q=batch.cu_q, seqused_k=list(batch.as_seqlens[1]), page_table=pages.table)
        once = fp.plan(
            batch.spans,
            like=(q, pages.k, pages.v),
            cu_seqlens_q=batch.cu_q,
            seqused_k=batch.as_seqlens[1],
            page_table=pages.table,
            mask=mask,
            backend="native",
        )
        out, lse = fp.attention(q, pages.k, pages.v, serving, return_lse=True)
        same, same_lse = fp.attention(q, pages.k, pages.v, once, return_lse=True)
        exact, exact_lse = exact_attention(q, k, v, mask=mask, spans=batch.spans, seqlens=batch.as_seqlens)
        assert_exact(out, exact, lse, exact_lse, context=f"seed {seed}, {batch}")
        if not text_only(batch.spans, *batch.as_seqlens):  # such a batch runs FA4's own kernel
            assert torch.equal(out, same)
            assert torch.equal(lse, same_lse)


TWO_SETS = diffusion_gemma.encoder_local_layers(100, like="transformers-generate", canvas=True)


def with_canvases(batch: Batch, seed: int) -> dict[str, list]:
    """Images where the batch has spans, and a canvas at the end of the keys of every other sequence."""
    rng = random.Random(f"canvas{seed}")
    canvas = [[(keys - rng.randint(1, rows), keys)] if rng.random() < 0.5 else [] for rows, keys in batch.seqlens]
    return {"image": [list(own) for own in batch.spans], "canvas": canvas}


def as_tensors(ranges: dict[str, list]) -> dict[str, torch.Tensor]:
    count = len(ranges["image"])
    return {
        name: Batch(((1, 1),) * count, tuple(map(tuple, own))).ranges_tensor().cuda() for name, own in ranges.items()
    }


def test_two_sets_of_spans_are_updated_and_captured_in_place() -> None:
    two_sets("native")


def test_two_sets_of_spans_in_two_passes(without_native: None) -> None:
    two_sets("two_pass")


def two_sets(backend: str) -> None:
    serving = serving_plan(TWO_SETS)
    assert (serving.choice.name, serving.in_place) == (backend, True)
    q, k, v = (
        torch.randn(*shape, device="cuda").to(torch.bfloat16) for shape in ((TOKENS, 4, 128), *[(2000, 16, 2, 128)] * 2)
    )
    fp.attention(q, k, v, serving)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp.attention(q, k, v, serving)
    for seed in range(6):
        batch = a_batch(seed)
        ranges = with_canvases(batch, seed)
        own_q, own_k, own_v = batch.tensors((4, 2), (128, 128), torch.bfloat16, "cuda", seed)
        pages = batch.in_pages(own_k, own_v, PAGE, seed)
        q[: len(own_q)], k[: len(pages.k)], v[: len(pages.v)] = own_q, pages.k, pages.v
        values, tensors = on_device(batch, pages, ranges=False), as_tensors(ranges)
        host = {"cu_seqlens_q": batch.cu_q, "seqused_k": list(batch.as_seqlens[1]), "page_table": pages.table}
        torch.cuda.set_sync_debug_mode("error")
        try:
            serving.update(tensors, **values) if seed % 2 else serving.update(ranges, **host)
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        called, lse = fp.attention(own_q, k, v, serving, return_lse=True)
        spans = {name: tuple(map(tuple, own)) for name, own in ranges.items()}
        exact, exact_lse = exact_attention(own_q, own_k, own_v, mask=TWO_SETS, spans=spans, seqlens=batch.as_seqlens)
        assert_exact(called, exact, lse, exact_lse, error=2.8e-3, context=f"seed {seed}, {batch}, {ranges}")
        assert_exact(out[: len(own_q)], exact, error=2.8e-3, context=f"replayed, seed {seed}, {batch}, {ranges}")


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a build whose internals are not known."""
    found = dataclasses.replace(locate.installed(), native_refusal="not for this test")
    monkeypatch.setattr(plan_module, "find_build", lambda module: found)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_two_passes_are_updated_and_captured_in_place(mask: fp.PrefixLM, without_native: None) -> None:
    serving = serving_plan(mask)
    assert (serving.choice.name, serving.in_place) == ("two_pass", True)
    q, k, v = (
        torch.randn(*shape, device="cuda").to(torch.bfloat16) for shape in ((TOKENS, 4, 128), *[(2000, 16, 2, 128)] * 2)
    )
    fp.attention(q, k, v, serving)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp.attention(q, k, v, serving)
    for seed in range(6):
        batch = a_batch(seed, "text" if seed == 3 else "mixed")
        own_q, own_k, own_v = batch.tensors((4, 2), (128, 128), torch.bfloat16, "cuda", seed)
        pages = batch.in_pages(own_k, own_v, PAGE, seed)
        q[: len(own_q)], k[: len(pages.k)], v[: len(pages.v)] = own_q, pages.k, pages.v
        serving.update(**on_device(batch, pages))
        exact, exact_lse = exact_attention(own_q, own_k, own_v, mask=mask, spans=batch.spans, seqlens=batch.as_seqlens)
        called, lse = fp.attention(own_q, k, v, serving, return_lse=True)
        graph.replay()
        assert_exact(called, exact, lse, exact_lse, error=2.8e-3, context=f"seed {seed}, {batch}")
        assert torch.equal(out[: len(own_q)], called)


@pytest.mark.parametrize("mask", [*MASKS, ENCODER], ids=str)
def test_a_captured_graph_replays_on_the_next_batch(mask: fp.Mask) -> None:
    """Two layers in one graph; batches with other lengths, ranges and pages; text-only ones too."""
    serving = serving_plan(mask)
    pool = 3000
    caches = [torch.zeros(pool, PAGE, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    q = torch.zeros(TOKENS, 4, 128, device="cuda", dtype=torch.bfloat16)
    outs = [torch.zeros_like(q) for _ in range(2)]

    def layers() -> None:
        for layer in range(2):
            fp.attention(q, caches[2 * layer], caches[2 * layer + 1], serving, out=outs[layer])

    layers()  # compiles, before any batch
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    for seed in range(8):
        batch = a_batch(seed, "text" if seed in (0, 5) else "mixed")
        rows = batch.cu_q[-1]
        given = [batch.tensors((4, 2), (128, 128), torch.bfloat16, "cuda", 100 * layer + seed) for layer in range(2)]
        all_pages = [batch.in_pages(own[1], own[2], PAGE, seed) for own in given]
        q[:rows] = given[0][0]
        for layer, pages in enumerate(all_pages):
            caches[2 * layer][: len(pages.k)] = pages.k
            caches[2 * layer + 1][: len(pages.v)] = pages.v
        for out in outs:
            out.fill_(float("nan"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            if seed % 2:
                torch.cuda.set_sync_debug_mode("default")
                values = on_device(batch, all_pages[0])
                torch.cuda.set_sync_debug_mode("error")
                serving.update(**values)
            else:
                spans = [list(own) for own in batch.spans]
                serving.update(
                    spans, cu_seqlens_q=batch.cu_q, seqused_k=list(batch.as_seqlens[1]), page_table=all_pages[0].table
                )
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for layer, (_, k, v) in enumerate(given):
            exact, _ = exact_attention(given[0][0], k, v, mask=mask, spans=batch.spans, seqlens=batch.as_seqlens)
            assert_exact(outs[layer][:rows], exact, context=f"seed {seed}, layer {layer}, {batch}")
            assert torch.isnan(outs[layer][rows:]).all(), "rows past the batch were written"


@pytest.mark.parametrize("ranges", [True, False])
def test_update_and_attention_do_not_synchronise(ranges: bool) -> None:
    serving = serving_plan(fp.PrefixLM(100))
    batch = a_batch(3)
    q, k, v = batch.tensors((4, 2), (128, 128), torch.bfloat16, "cuda", 0)
    pages = batch.in_pages(k, v, PAGE, 0)
    values = on_device(batch, pages, ranges)
    serving.update(**values)
    fp.attention(q, pages.k, pages.v, serving)
    torch.cuda.set_sync_debug_mode("error")
    try:
        serving.update(**values)
        out = fp.attention(q, pages.k, pages.v, serving)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    spans = batch.spans if ranges else ((),) * len(batch.spans)
    exact, _ = exact_attention(q, k, v, mask=fp.PrefixLM(100), spans=spans, seqlens=batch.as_seqlens)
    assert_exact(out, exact)


@pytest.mark.parametrize("mask", [causal, causal & window(70)], ids=str)
def test_a_mask_without_spans_is_captured_as_fa4s_own_call(mask: fp.Mask) -> None:
    serving = serving_plan(mask)
    assert (serving.choice.name, serving.in_place) == ("causal", True)
    cache = [torch.zeros(3000, PAGE, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    q = torch.zeros(TOKENS, 4, 128, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros_like(q)
    fp.attention(q, *cache, serving, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fp.attention(q, *cache, serving, out=out)
    for seed in range(3):
        batch = a_batch(seed, "text")
        rows = batch.cu_q[-1]
        own, k, v = batch.tensors((4, 2), (128, 128), torch.bfloat16, "cuda", seed)
        pages = batch.in_pages(k, v, PAGE, seed)
        q[:rows], cache[0][: len(pages.k)], cache[1][: len(pages.v)] = own, pages.k, pages.v
        serving.update(**on_device(batch, pages, ranges=False))
        graph.replay()
        exact, _ = exact_attention(own, k, v, mask=mask, spans={}, seqlens=batch.as_seqlens)
        assert_exact(out[:rows], exact, context=f"seed {seed}, {batch}")


def test_capturing_an_uncompiled_kernel_and_other_backends_raise() -> None:
    batch = Batch(((200, 300),), (((100, 300),),))
    q, k, v = batch.tensors((10, 2), (40, 40), torch.bfloat16, "cuda", 0)
    pages = batch.in_pages(k, v, PAGE, 0)
    two = fp.serving_plan(
        like=(q, pages.k, pages.v),
        max_tokens=200,
        max_sequences=2,
        max_pages=32,
        mask=causal & (prefix("image") | window(50)),
    )
    assert not two.in_place
    two.update([[(0, 20)]], cu_seqlens_q=[0, 200], seqused_k=[300], page_table=pages.table)
    fp.attention(q, pages.k, pages.v, two)
    with pytest.raises(fp.UnsupportedError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fp.attention(q, pages.k, pages.v, two)
    q, k, v = batch.tensors((10, 2), (48, 48), torch.bfloat16, "cuda", 0)
    pages = batch.in_pages(k, v, PAGE, 0)
    fresh = fp.serving_plan(like=(q, pages.k, pages.v), max_tokens=200, max_sequences=2, max_pages=32)
    with pytest.raises(fp.UnsupportedError, match="compile"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fp.attention(q, pages.k, pages.v, fresh)


SCRIPT = """
import sys, torch, fa4_prefixlm as fp
q = torch.randn(100, 2, 64, device="cuda", dtype=torch.bfloat16)
cache = torch.zeros(20, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
plan = fp.serving_plan(like=(q, cache, cache), max_tokens=100, max_sequences=2, max_pages=16)
ints = lambda values: torch.tensor(values, dtype=torch.int32, device="cuda")
cu, used, spans, *width = eval(sys.argv[1])
table = torch.arange(*width or (16,), dtype=torch.int32, device="cuda")[None].repeat(len(used), 1)
plan.update(ints(spans), cu_seqlens_q=ints(cu), seqused_k=ints(used), page_table=table)
fp.attention(q, cache, cache, plan)
torch.cuda.synchronize()
print("fine")
"""


@pytest.mark.parametrize(
    ("values", "fine"),
    [
        ("([0, 60, 100], [60, 90], [[(4, 20)], [(60, 90)]])", True),
        ("([0, 60, 100], [60, 90], [[(4, 20)], [(95, 190)]])", True),
        ("([0, 60, 100], [60, 90], [[(4, 20)], [(60, 91)]])", False),
        ("([0, 60, 100], [59, 90], [[(4, 20)], [(60, 90)]])", False),
        ("([0, 60, 101], [60, 90], [[(4, 20)], [(60, 90)]])", False),
        ("([0, 60, 100], [60, 257], [[(4, 20)], [(60, 90)]])", False),
        ("([0, 60, 100], [60, 90], [[(4, 20), (10, 30)], [(60, 90), (0, 0)]])", False),
        ("([0, 60, 100], [60, 90], [[(4, 20)], [(60, 90)]], 6)", True),
        ("([0, 60, 100], [60, 90], [[(4, 20)], [(60, 90)]], 5)", False),  # 5 pages hold 80 keys
    ],
)
def test_device_values_are_asserted_on_the_device(values: str, fine: bool) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, values], capture_output=True, text=True, check=False)
    if fine:
        assert done.stdout.strip() == "fine", done.stderr
    else:
        assert done.returncode != 0
        assert "expected" in done.stderr or "assert" in done.stderr
