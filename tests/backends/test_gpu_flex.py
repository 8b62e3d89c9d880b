"""What FlexAttention is for, on the GPU: many intervals, other dtypes and head dims; what is compiled anew; pages."""

from __future__ import annotations

import random

import pytest
import torch
from torch._dynamo.utils import counters

import fa4_prefixlm as fp
from fa4_prefixlm.backends.flex_attend import compiled
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.masks import causal, key_in, key_outside, one_block, prefix, query_in, same_span, window
from fa4_prefixlm.masks.models.catalogue import CATALOGUE
from fa4_prefixlm.testing.accuracy import exact_attention
from fa4_prefixlm.testing.batches import Batch, random_batch
from fa4_prefixlm.testing.empty_rows import Blind
from fa4_prefixlm.testing.poison import nan_output, poison_free_memory
from tests.backends.gpu_calls import MANY, OWN, Kind, causal_band, limit, many_spans, measured, tensors_of
from tests.exactness import assert_within, errors

pytestmark = pytest.mark.gpu


def exact_of(q, k, v, mask, spans: dict[str, list], batch: Batch, options: Options):
    named = {name: tuple(tuple(own) for own in each) for name, each in spans.items()}
    return exact_attention(q, k, v, mask=mask, spans=named, seqlens=batch.as_seqlens, options=options)


def plan_of(q, k, v, mask, spans, batch: Batch, backend: str = "auto") -> fp.Plan:
    where = {"cu_seqlens_q": batch.cu_q, "cu_seqlens_k": batch.cu_k}
    return fp.plan(spans, like=(q, k, v), mask=mask, backend=backend, **where)


@pytest.mark.parametrize("mask", [MANY, OWN], ids=["by its rule", "by intervals"])
@pytest.mark.parametrize("most", [3, 6, 7, 30], ids=lambda most: f"{most + 2} intervals")
def test_many_intervals(most: int, mask: fp.Mask, gpu_report) -> None:
    """5 to 9 intervals a row, and 32; told by the mask's own rule, or compared up to 16 and searched beyond."""
    kind = Kind((128, 128))
    for seed in range(3):
        rng = random.Random(f"{most}{seed}")
        batch = random_batch(rng, longest=900, empty=False)
        q, k, v, options = tensors_of(kind, batch, seed)
        spans = many_spans(rng, batch, most)
        exact, exact_lse = exact_of(q, k, v, mask, spans, batch, options)
        band = causal_band(q, k, v, batch, 60, options)
        plan = plan_of(q, k, v, mask, spans, batch, "flex")
        told_by_rule = mask is MANY and plan.prepared.intervals > 4  # in short sequences spans touch
        assert (plan.prepared.rule is not None) == told_by_rule
        poison_free_memory()
        out, lse = fp.attention(q, k, v, plan, out=nan_output(q, 128), return_lse=True)
        found = errors(out, exact, lse, exact_lse)
        gpu_report(kind=str(kind), seed=seed, backend="flex", mask=f"{most + 2} intervals", **measured(found, band))
        assert_within(found, limit("flex", kind, band, 2.6e-3), f"{most}, seed {seed}, {batch}, {spans}")


RULES = [
    key_in("image"),
    causal & key_outside("image"),
    window(None, 40) & key_outside("image"),
    causal & key_in("image") | same_span("prompt", before=29),
    prefix("prompt") & key_outside("image") & same_span("document"),
    query_in("prompt") & key_in("image") | causal & window(5),
    causal & (one_block("prompt") | key_in("image")),
    fp.PrefixLM(100, clamp=False) | causal & key_in("image"),
]


def several_spans(rng: random.Random, batch: Batch, mask: fp.Mask) -> dict[str, list]:
    """Many small images, a prompt, and a document that is all of a sequence."""
    named: dict[str, list] = {"image": [], "prompt": [], "document": []}
    for _, keys in batch.seqlens:
        named["image"].append([(at, min(at + rng.randint(1, 11), keys)) for at in range(0, keys, 24)])
        named["prompt"].append([(0, min(400, keys))])
        named["document"].append([(0, keys)])
    return {name: named[name] for name in mask.names}


@pytest.mark.parametrize("mask", RULES, ids=str)
def test_the_rules_of_masks(mask: fp.Mask, gpu_report) -> None:
    """Every atom and several sets, packed and in chunks; new ranges and lengths compile nothing."""
    kind, compilations = Kind((64, 64)), []
    for seed in range(4):
        rng = random.Random(f"{mask}{seed}")
        seqlens = ((900, 900), *random_batch(rng, longest=900, empty=False).seqlens)
        batch = Batch(seqlens, ((),) * len(seqlens))
        q, k, v, options = tensors_of(kind, batch, seed)
        spans = several_spans(rng, batch, mask)
        plan = plan_of(q, k, v, mask, spans, batch, "flex")
        assert plan.prepared.rule is not None
        poison_free_memory()
        out, lse = fp.attention(q, k, v, plan, out=nan_output(q, 64), return_lse=True)
        compilations.append(counters["stats"]["unique_graphs"])
        exact, exact_lse = exact_of(q, k, v, mask, spans, batch, options)
        band = causal_band(q, k, v, batch, 60, options)
        found = errors(out, exact, lse, exact_lse)
        gpu_report(kind=str(kind), seed=seed, backend="flex", mask=str(mask), **measured(found, band))
        assert_within(found, limit("flex", kind, band, 2.6e-3), f"{mask}, seed {seed}, {batch}, {spans}")
    assert len(set(compilations)) == 1


def test_a_mask_of_more_intervals_than_fa4_takes_is_not_dense(recwarn: pytest.WarningsRecorder) -> None:
    batch = Batch(((700, 700), (20, 300)), ((), ()))
    q, k, v, _ = tensors_of(Kind((128, 128)), batch, 0)
    spans = {"image": [[(at, at + 9) for at in range(0, 300, 30)], [(0, 9)]], "prompt": [[(0, 40)], [(0, 5)]]}
    plan = plan_of(q, k, v, MANY, spans, batch)
    assert plan.choice.name in ("cudnn", "flex")
    assert plan.choice.backward.name in ("native", "cudnn", "flex")
    assert not [own for own in recwarn if "reference" in str(own.message)]


@pytest.mark.parametrize("name", CATALOGUE)
def test_no_mask_of_the_catalogue_is_dense(name: str) -> None:
    """With one span, and with many."""
    mask = CATALOGUE[name].mask
    batch = Batch(((700, 700),), ((),))
    q, k, v, _ = tensors_of(Kind((128, 128)), batch, 0)
    for count in (1, 9, 40):
        spans = {own: [[(at * 17, at * 17 + 9) for at in range(count)]] for own in mask.names}
        plan = plan_of(q, k, v, mask, spans, batch)
        assert plan.choice.name != "reference"
        assert plan.choice.backward.name != "reference"


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        ((64, 64), torch.float32),
        ((256, 256), torch.float32),
        ((72, 40), torch.float32),
        ((320, 320), torch.bfloat16),
        ((512, 512), torch.bfloat16),
        ((20, 20), torch.bfloat16),
    ],
    ids=str,
)
def test_head_dims_and_dtypes_that_fa4_does_not_take(dims: tuple[int, int], dtype: torch.dtype) -> None:
    batch = Batch(((300, 300), (100, 260), (0, 9)), (((4, 260),), ((0, 100), (200, 256)), ()))
    q, k, v = batch.tensors((4, 2), dims, dtype, "cuda", 1)
    plan = plan_of(q, k, v, fp.PrefixLM(100), batch.spans, batch)
    assert plan.choice.name == "flex"
    exact, exact_lse = exact_attention(q, k, v, mask=fp.PrefixLM(100), spans=batch.spans, seqlens=batch.as_seqlens)
    out, lse = fp.attention(q, k, v, plan, return_lse=True)
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=rtol / 4)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


def test_new_ranges_and_lengths_compile_nothing() -> None:
    """Forward and backward, over random batches under one window each, and over the numbers of intervals of a form."""
    kind = Kind((64, 64))

    def step(batch: Batch, mask: fp.Mask, spans) -> None:
        q, k, v, _ = tensors_of(kind, batch, 0)
        plan = plan_of(q, k, v, mask, spans, batch, "flex")
        plan(q, k, v)
        leaves = [own.requires_grad_() for own in (q, k, v)]
        torch.autograd.grad(plan(*leaves).float().square().sum(), leaves)

    rng = random.Random(4)
    first = random_batch(rng, empty=False)
    step(first, fp.PrefixLM(30), first.spans)
    step(first, MANY, many_spans(rng, first, 3))
    step(first, OWN, many_spans(rng, first, 3))
    before, forms = counters["stats"]["unique_graphs"], compiled.cache_info().misses
    for _ in range(5):
        batch = random_batch(rng, longest=1500, empty=False)
        step(batch, fp.PrefixLM(rng.randint(1, 300)), batch.spans)
        step(batch, MANY, many_spans(rng, batch, rng.randint(3, 30)))
        step(batch, OWN, many_spans(rng, batch, rng.randint(3, 6)))
    # In short sequences spans touch, so a batch may have the number of intervals of another form.
    assert counters["stats"]["unique_graphs"] - before == compiled.cache_info().misses - forms
    assert compiled.cache_info().misses - forms <= 4


def test_a_serving_plan_that_no_kernel_updates_gathers_for_flex() -> None:
    q = torch.randn(60, 4, 128, device="cuda", dtype=torch.bfloat16)
    batch = Batch(((60, 300),), ((),))
    _, k, v, _ = tensors_of(Kind((128, 128)), batch, 2)
    pages = batch.in_pages(k, v, 16, 1)
    serving = fp.serving_plan(
        like=(q, pages.k, pages.v), max_tokens=128, max_sequences=2, max_pages=pages.table.shape[1], mask=MANY
    )
    spans = {"image": [[(at, at + 9) for at in range(0, 270, 30)]], "prompt": [[(0, 40)]]}
    serving.update(spans, cu_seqlens_q=[0, 60], seqused_k=[300], page_table=pages.table)
    assert not serving.in_place
    assert (serving.choice.name, serving.choice.forward.gathered) == ("flex", True)
    exact, _ = exact_of(q, k, v, MANY, spans, batch, Options(128**-0.5))
    out = fp.attention(q, pages.k, pages.v, serving)
    assert errors(out, exact).error < 2.6e-3


def test_in_a_compiled_model_with_gradients() -> None:
    """The custom op runs it, and its backward computes the forward again."""
    batch = Batch(((500, 500),), ((),))
    q, k, v, _ = tensors_of(Kind((64, 64)), batch, 3)
    plan = plan_of(q, k, v, causal | one_block("image"), {"image": [[(5, 60), (100, 180)]]}, batch, "flex")

    def layer(q, k, v):
        return fp.attention(q * 2, k, v, plan) * 2

    found = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [own.detach().clone().requires_grad_() for own in (q, k, v)]
        run(*leaves).float().square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_a_graph_that_is_kept_runs_again() -> None:
    batch = Batch(((300, 300),), (((20, 120),),))
    leaves = [own.requires_grad_() for own in tensors_of(Kind((64, 64)), batch, 4)[:3]]
    out = plan_of(*leaves, fp.PrefixLM(), batch.spans, batch, "flex")(*leaves)
    first, again = (torch.autograd.grad(out.float().sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_blind_rows_have_no_gradient_and_no_nan() -> None:
    batch = Batch(((500, 500), (90, 90)), (((210, 300),), ()))
    q, k, v, _ = tensors_of(Kind((64, 64)), batch, 6)
    leaves = [own.requires_grad_() for own in (q, k, v)]
    out, lse = fp.attention(*leaves, plan_of(q, k, v, Blind(), batch.spans, batch, "flex"), return_lse=True)
    seen = lse.detach() > float("-inf")
    grads = torch.autograd.grad(out.float().sum() + lse[seen].sum(), leaves)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][:200] == 0).all()
