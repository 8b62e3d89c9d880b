"""FlexAttention on the CPU against float64, its blocks against the dense mask, and what is compiled anew.

Here it runs as torch's dense form: the tables that its mask reads are judged by results, the blocks by looking.
"""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from torch._dynamo.utils import counters

import fa4_prefixlm as fp
from fa4_prefixlm.backends.flex import is_searched
from fa4_prefixlm.backends.flex_attend import BLOCK, Form, blocks_that_fit, with_sink
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.masks import causal, key_in, one_block, prefix, same_span, window
from fa4_prefixlm.masks.base import And
from fa4_prefixlm.testing.accuracy import exact_attention
from fa4_prefixlm.testing.batches import UGLY, Batch, masks_for, random_batch, random_mask
from fa4_prefixlm.testing.empty_rows import Blind, ChainedBlind
from fa4_prefixlm.testing.poison import nan_output

TWO = Batch(((600, 600), (70, 90)), ())
MANY = causal & (key_in("image") | window(20))


class Somebodys(And):
    """Another's class, which may say anything: its rows' intervals tell, not its rule."""


OWN = Somebodys(causal, key_in("image") | window(20))
SINKS = torch.tensor([0.5, -1.0, 2.0, -math.inf])


def images(count: int) -> dict[str, list]:
    """`count` small ones in the first sequence of `TWO`, one in the second."""
    return {"image": [[(at, at + 7) for at in range(0, 18 * count, 18)], [(0, 9)]]}


def plan_of(batch: Batch, mask: fp.Mask, spans=None, heads=(4, 2), dims=(16, 24)) -> tuple[fp.Plan, tuple]:
    tensors = batch.tensors(heads, dims, torch.float32, "cpu")
    spans = batch.spans if spans is None else spans
    where = {"cu_seqlens_q": batch.cu_q, "cu_seqlens_k": batch.cu_k}
    return fp.plan(spans, like=tensors, mask=mask, backend="flex", **where), tensors


def check(batch: Batch, mask: fp.Mask, spans=None, heads=(4, 2), dims=(16, 24), **options) -> fp.Plan:
    """One call against float64."""
    plan, (q, k, v) = plan_of(batch, mask, spans, heads, dims)
    out = nan_output(q, dims[1])
    same, lse = fp.attention(q, k, v, plan, out=out, return_lse=True, **options)
    assert same.data_ptr() == out.data_ptr()
    scale = options.pop("softmax_scale", dims[0] ** -0.5)
    named = {name: tuple(tuple(own) for own in each) for name, each in (spans or {}).items()}
    exact, exact_lse = exact_attention(
        *(q, k, v),
        mask=mask,
        spans=named if spans is not None else batch.spans,
        seqlens=batch.as_seqlens,
        options=Options(scale, **options),
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    return plan


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(seed: int) -> None:
    rng = random.Random(seed)
    check(random_batch(rng), random_mask(rng))


@pytest.mark.parametrize("name", UGLY)
def test_ugly_batches(name: str) -> None:
    for mask in masks_for(UGLY[name]):
        check(UGLY[name], mask)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4, 5, 7, 8, 15, 16, 31])
def test_any_number_of_intervals(count: int) -> None:
    """Compared one by one, then searched, or told by the mask; 32 intervals have as many ends as a power of two."""
    plan = check(TWO, OWN, images(count))
    assert plan.prepared.rule is None
    assert plan.bounds.count == count + 1
    assert is_searched(plan.bounds.count) == (count >= 16)
    assert (check(TWO, MANY, images(count)).prepared.rule is None) == (count < 4)
    check(TWO, causal | one_block("image"), images(count))


@pytest.mark.parametrize(
    "mask",
    [
        (causal | same_span("image")) & (prefix("prompt") | window(30)),
        (causal | same_span("image")) & same_span("document"),
        (causal & window(50)) | one_block("image"),
    ],
    ids=str,
)
def test_masks_of_several_span_sets(mask: fp.Mask) -> None:
    spans = {"prompt": [[(0, 40)], [(0, 5)]], "document": [[(0, 300), (300, 600)], [(0, 90)]], **images(9)}
    check(TWO, mask, {name: spans[name] for name in mask.names})


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 20.0},
        {"softmax_scale": 0.3, "learnable_sink": SINKS},
        {"softcap": 20.0, "learnable_sink": SINKS.to(torch.bfloat16)},
    ],
    ids=["softcap", "scale and sinks", "softcap and sinks"],
)
def test_options(options: dict) -> None:
    batch = Batch(((300, 300), (20, 90)), (((250, 280),), ((70, 90),)))
    for mask in (fp.PrefixLM(100), Blind()):
        check(batch, mask, **options)


def test_rows_that_see_nothing_are_zero_with_lse_minus_infinity() -> None:
    batch = Batch(((300, 300), (0, 50), (20, 20)), (((250, 280),), (), ()))
    for mask in (Blind(), ChainedBlind(window=100)):
        check(batch, mask)
        plan, (q, k, v) = plan_of(batch, mask)
        out, lse = plan(q, k, v, return_lse=True)
        assert (out[:200] == 0).all()
        assert (lse[:, :200] == -math.inf).all()


def test_a_sink_of_a_row_that_sees_nothing_has_no_nan() -> None:
    out, lse = torch.zeros(2, 4, 8), torch.tensor([[-math.inf, 1.0]]).expand(4, 2).clone()
    leaves = [out.requires_grad_(), lse.requires_grad_(), SINKS.clone().requires_grad_()]
    result, total = with_sink(*leaves)
    assert torch.equal(total[:, 0], SINKS)
    assert torch.isfinite(result).all()
    grads = torch.autograd.grad(result.sum() + total[:3].sum(), leaves)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_batched_tensors_and_keys_in_pages() -> None:
    q, k, v = torch.randn(3, 20, 4, 16), torch.randn(3, 30, 2, 16), torch.randn(3, 30, 2, 16)
    ranges = [[(0, 12)], [], [(5, 29)]]
    wanted = fp.attention(q, k, v, ranges, return_lse=True)
    for own, other in zip(fp.attention(q, k, v, ranges, return_lse=True, backend="flex"), wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    batch = Batch(((20, 60), (30, 30)), (((45, 55),), ((0, 25),)))
    plan, (q, k, v) = plan_of(batch, fp.PrefixLM(16))
    pages = batch.in_pages(k, v, 16, seed=1)
    used = torch.tensor(batch.as_seqlens[1], dtype=torch.int32)
    paged = fp.plan(
        batch.spans,
        like=(q, pages.k, pages.v),
        cu_seqlens_q=batch.cu_q,
        seqused_k=used,
        page_table=pages.table,
        mask=fp.PrefixLM(16),
        backend="flex",
    )
    assert paged.choice.gathered
    torch.testing.assert_close(paged(q, pages.k, pages.v), plan(q, k, v), rtol=1e-5, atol=1e-5)


def test_the_blocks_hold_what_is_seen_and_full_ones_are_seen_whole() -> None:
    rng = random.Random(1)
    cases = [(random_batch(rng), random_mask(rng), None) for _ in range(10)]
    cases += [(batch, mask, None) for batch in UGLY.values() for mask in masks_for(batch)]
    cases += [(TWO, mask, images(n)) for n in (3, 12) for mask in (MANY, OWN, causal | one_block("image"))]
    for batch, mask, spans in cases:
        plan, _ = plan_of(batch, mask, spans, heads=(1, 1))
        seen = dense_of(plan)
        tables = plan.prepared.tables_of_backward
        some, every = blocks_of(seen)
        assert torch.equal(listed(tables.counts, tables.indices, some), some & ~every)
        assert torch.equal(listed(tables.full_counts, tables.full_indices, some), every)
        assert torch.equal(listed(tables.row_counts, tables.row_indices, some.T), (some & ~every).T)
        assert torch.equal(listed(tables.full_row_counts, tables.full_row_indices, some.T), every.T)


def dense_of(plan: fp.Plan) -> torch.Tensor:
    """The mask of the packed batch with its padding, `(padded rows, padded keys)`, by its words."""
    seen = torch.zeros(plan.prepared.rows * BLOCK, plan.prepared.keys * BLOCK, dtype=torch.bool)
    row = key = 0
    for index, (rows, keys) in enumerate(zip(*plan.lengths.on_host(), strict=True)):
        spans = {name: own.on_host()[index] for name, own in plan.spans.items()}
        seen[row : row + rows, key : key + keys] = plan.mask.dense(seqlen=keys, ranges=spans, seqlen_q=rows)
        row, key = row + rows, key + keys
    return seen


def blocks_of(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether some, and whether every pair of each block is seen."""
    blocks = seen.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    return blocks.any(3).any(1), blocks.all(3).all(1)


def listed(counts: torch.Tensor, indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(like)
    for block, count in enumerate(counts[0, 0].tolist()):
        own = indices[0, 0, block, :count]
        assert (own.diff() > 0).all(), "a block is visited twice"
        found[block, own.long()] = True
    return found


@pytest.mark.slow
def test_new_ranges_and_lengths_compile_nothing() -> None:
    dims = (16, 40)  # of no other test
    check(TWO, OWN, images(5), dims=dims)
    check(TWO, MANY, images(5), dims=dims)
    check(TWO, fp.PrefixLM(30), {"image": [[(4, 90)], []]}, dims=dims)
    before = counters["stats"]["unique_graphs"]
    rng = random.Random(2)
    for _ in range(6):
        check(random_batch(rng, empty=False), fp.PrefixLM(rng.randint(1, 300)), dims=dims)
        check(TWO, OWN, images(rng.randint(4, 5)), dims=dims)
        check(TWO, MANY, images(rng.randint(4, 40)), dims=dims)
    assert counters["stats"]["unique_graphs"] == before
    check(TWO, OWN, images(12), dims=dims)  # the count of intervals is rounded up to an even one
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize("tokens", [256, 257])
@pytest.mark.parametrize("enabled", [True, False])
def test_leaves_of_whole_blocks(tokens: int, enabled: bool) -> None:
    """Which are not padded: torch refuses such leaves on the CPU."""
    x = torch.randn(1, tokens, 2, 16, requires_grad=True)
    with torch.set_grad_enabled(enabled):
        out = fp.attention(x, x, x, [[(3, 40)]], backend="flex")
    torch.testing.assert_close(out, fp.attention(x, x, x, [[(3, 40)]], backend="reference"), rtol=1e-5, atol=1e-5)
    assert out.requires_grad == enabled


WIDE = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_warps": 8}
SMALL = {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 16, "fwd_num_stages": 1, "bwd_num_stages": 1}
SMALL |= dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32)


@pytest.mark.parametrize(
    ("arch", "dtype", "dims", "searched", "wanted"),
    [
        (90, torch.bfloat16, (256, 256), False, {}),
        (80, torch.float32, (128, 128), False, {}),
        (89, torch.bfloat16, (128, 128), False, {}),
        (90, torch.bfloat16, (512, 512), False, WIDE | {"fwd_num_stages": 2}),
        (80, torch.bfloat16, (512, 512), False, WIDE | {"fwd_num_stages": 1}),
        (89, torch.bfloat16, (512, 512), False, SMALL),
        (90, torch.bfloat16, (64, 64), True, {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 3}),
        (89, torch.float32, (72, 40), False, {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 1}),
        (89, torch.float32, (128, 64), False, {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 1}),
    ],
)
def test_blocks_fit_the_shared_memory_of_the_gpu(arch: int, dtype, dims, searched: bool, wanted: dict) -> None:
    """As kernels compiled for these architectures said that they need."""
    form = Form("cuda", arch, dtype, (16, 8), dims, 2, searched, False, 1.0, 0.0, False, False)
    assert blocks_that_fit(form) == wanted
    assert blocks_that_fit(dataclasses.replace(form, device="cpu")) == {}
    gemma = blocks_that_fit(dataclasses.replace(form, arch=89, dtype=torch.bfloat16, dims=(256, 256)))
    assert (gemma["fwd_num_stages"], gemma["bwd_BLOCK_M1"], gemma["bwd_num_stages"]) == (1, 32, 1)


def test_autocast_does_not_reach_it() -> None:
    plan, (q, k, v) = plan_of(TWO, fp.PrefixLM(), [[], []])
    plain = plan(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plan(q, k, v), plain)


def test_gradients_on_the_cpu_are_those_of_the_reference() -> None:
    plan, (q, k, v) = plan_of(TWO, MANY, images(6))
    assert plan.choice.backward.name == "reference"
    assert dict(plan.choice.backward.passed_over)["flex"] == "FlexAttention has no backward on the CPU"
    leaves = [own.requires_grad_() for own in (q, k, v)]
    dense = fp.plan(images(6), like=(q, k, v), cu_seqlens_q=TWO.cu_q, cu_seqlens_k=TWO.cu_k, mask=MANY)
    found, wanted = (torch.autograd.grad(each(*leaves).square().sum(), leaves) for each in (plan, dense))
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_print_says_what_runs() -> None:
    for mask, told in ((MANY, True), (OWN, False)):
        plan, _ = plan_of(TWO, mask, images(6))
        text = str(plan)
        assert "backend  flex: torch's FlexAttention" in text
        assert "7 intervals a row" in text
        assert ("told by the mask's own rule" in text) == told
        assert "partial" in text


@pytest.mark.slow
def test_one_form_for_both_grad_modes() -> None:
    """A forward whose backward is another backend's runs in autograd's own no-grad mode."""
    plan, tensors = plan_of(TWO, fp.PrefixLM(30), {"image": [[(4, 90)], []]}, dims=(16, 56))  # of no other test
    plan(*tensors)
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        plan(*tensors)
    assert counters["stats"]["unique_graphs"] == before
