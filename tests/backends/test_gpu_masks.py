"""Masks beyond PrefixLM on the GPU: several intervals a row, blocks of tags, the catalogue, masks from functions."""

from __future__ import annotations

import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.geometry.telling_rows import TellingRows
from fa4_prefixlm.geometry.telling_rows import measured as measured_traits
from fa4_prefixlm.geometry.traits import MOST_INTERVALS
from fa4_prefixlm.masks import causal, everything, from_cute, from_flex, key_in, one_block, prefix, same_span, window
from fa4_prefixlm.masks.models.catalogue import CATALOGUE
from fa4_prefixlm.testing.accuracy import exact_attention, exact_gradients, relative_error
from fa4_prefixlm.testing.batches import EDGES, Batch, random_spans
from fa4_prefixlm.testing.poison import nan_output, poison_free_memory
from fa4_prefixlm.testing.stages import prepare
from tests.backends.gpu_calls import Kind, causal_band, limit, measured, tensors_of
from tests.exactness import assert_within, errors
from tests.masks.layouts import layouts

pytestmark = pytest.mark.gpu

MASKS = {
    "everything": everything,
    "both ways": window(100, 60),
    "both ways and spans": window(90, 30) | same_span("image"),
    "spans that look right in a window": (causal | same_span("image")) & window(100, 30),
    "two intervals": causal & (prefix("prompt") | window(100)),
    "two intervals and spans": (causal | same_span("image")) & (prefix("prompt") | window(130)),
    "three intervals": causal & (window(60) | key_in("image")),
    "four intervals": causal & (window(60) | key_in("image") | prefix("prompt")),
    "documents": (causal | same_span("image")) & same_span("document"),
    "block of tags": causal | one_block("many"),
    "window and block of tags": (causal & window(90)) | one_block("many"),
    "from flex": from_flex(lambda b, h, q, kv: (q >= kv) & ((q - kv < 70) | (kv < 30) | ((kv >= 200) & (kv < 240)))),
}
FLEX_KIND = Kind((128, 128))  # the one that flex runs: it compiles for seconds for each kind and count of intervals
KINDS = [Kind((64, 64)), Kind((128, 128)), Kind((256, 256)), Kind((128, 128), torch.float16, (6, 1), sink=True)]


def a_batch(rng: random.Random) -> Batch:
    seqlens = []
    for _ in range(rng.randint(1, 4)):
        keys = rng.choice(EDGES) if rng.random() < 0.4 else rng.randint(1, 1100)
        seqlens.append((keys if rng.random() < 0.6 else rng.randint(1, keys), keys))
    return Batch(tuple(seqlens), tuple(() for _ in seqlens))


def spans_for(mask: fp.Mask, batch: Batch, rng: random.Random) -> dict[str, list]:
    """Few images and documents, many small ones, one prompt at 0."""

    def some(name: str, keys: int) -> tuple[tuple[int, int], ...]:
        if name == "prompt":
            return ((0, rng.randint(1, keys)),)
        if name == "many":
            return tuple((at, at + 7) for at in range(rng.randint(0, 20), keys - 7, 40))
        return random_spans(rng, keys)[:2] if name == "image" else random_spans(rng, keys)

    return {name: [some(name, keys) for _, keys in batch.seqlens] for name in sorted(mask.names)}


def check(mask: fp.Mask, batch: Batch, spans: dict[str, list], kind: Kind, seed: int, report, label: str) -> set[str]:
    """Every one-call backend that takes the mask, against fp64; returns the backends that ran."""
    q, k, v, options = tensors_of(kind, batch, seed)
    named = {name: tuple(tuple(own) for own in sequences) for name, sequences in spans.items()}
    exact, exact_lse = exact_attention(q, k, v, mask=mask, spans=named, seqlens=batch.as_seqlens, options=options)
    band = causal_band(q, k, v, batch, 64, options)
    ran = set()
    for backend in ("native", "varlen", "packed", *["flex"] * (kind == FLEX_KIND)):
        poison_free_memory()
        try:
            plan = fp.plan(
                spans, like=(q, k, v), cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, mask=mask, backend=backend
            )
        except fp.UnsupportedError:
            continue
        outs = []
        for _ in range(2):
            out = nan_output(q, v.shape[2])
            poison_free_memory()
            outs.append(fp.attention(q, k, v, plan, out=out, return_lse=True, learnable_sink=options.learnable_sink))
        (out, lse), (again, _) = outs
        assert torch.equal(out, again), "two runs differ"
        assert torch.equal(lse == float("-inf"), exact_lse == float("-inf")), "LSE of rows that see nothing"
        found = errors(out, exact, lse, exact_lse)
        report(kind=str(kind), seed=seed, backend=backend, mask=label, batch=label, **measured(found, band))
        at_least = 2.6e-3 if q.dtype == torch.bfloat16 else 3.2e-4
        context = f"{label}, {backend}, seed {seed}, {batch}, {spans}"
        assert_within(found, limit(backend, kind, band, at_least), context)
        ran.add(backend)
    return ran


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, kind: Kind, gpu_report) -> None:
    for seed in range(6):
        rng = random.Random(f"{name}{seed}")
        batch = a_batch(rng)
        ran = check(MASKS[name], batch, spans_for(MASKS[name], batch, rng), kind, seed, gpu_report, name)
        assert "varlen" in ran
        assert ("flex" in ran) == (kind == FLEX_KIND)


@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue(name: str, gpu_report) -> None:
    entry = CATALOGUE[name]
    for seed, kind in enumerate((Kind((128, 128)), Kind((256, 256)))):
        for case in range(3):
            rng = random.Random(f"{name}{seed}{case}")
            batch = a_batch(rng)
            spans = {
                span_set: [random_spans(rng, keys)[:4] or ((0, keys),) for _, keys in batch.seqlens]
                for span_set in sorted(entry.mask.names)
            }
            ran = check(entry.mask, batch, spans, kind, case, gpu_report, name)
            counted = prepare(batch, entry.mask, spans)
            seen = measured_traits(counted.traits, TellingRows(entry.mask, counted.spans, counted.sizes))
            assert ("varlen" in ran) == (seen.tagged or seen.intervals <= MOST_INTERVALS)


@pytest.mark.parametrize("kind", KINDS[1:3], ids=str)
@pytest.mark.parametrize("name", layouts())
def test_layouts(name: str, kind: Kind, gpu_report) -> None:
    for seed, scale in enumerate((1, 4)):
        mask, batch, spans = layouts(scale)[name]
        assert "varlen" in check(mask, batch, spans, kind, seed, gpu_report, name)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("name", layouts())
def test_gradients_of_layouts(name: str, dim: int, deterministic: bool) -> None:
    """On FA4's backward, whichever the plan chooses: the masks whose sets of spans belong together."""
    mask, batch, spans = layouts(3)[name]
    q, k, v = (own.requires_grad_() for own in batch.tensors((4, 2), (dim, dim), torch.bfloat16, "cuda"))
    plan = fp.plan(spans, like=(q, k, v), cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, mask=mask)
    out = fp.attention(q, k, v, plan, deterministic=deterministic)
    dout = torch.randn_like(out)
    poison_free_memory()
    grads = torch.autograd.grad(out, (q, k, v), dout)
    named = {own: tuple(map(tuple, sequences)) for own, sequences in spans.items()}
    exact = exact_gradients(q, k, v, dout, mask=mask, spans=named, seqlens=batch.as_seqlens)
    for letter, got, right in zip("qkv", grads, (exact.q, exact.k, exact.v), strict=True):
        assert relative_error(got.double(), right) < 5e-3, f"d{letter}, {plan}"


@pytest.mark.filterwarnings("ignore")  # some masks of many intervals go to the reference, and say so
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_a_plan_does_not_synchronise(name: str, on_device: bool) -> None:
    mask, rng = CATALOGUE[name].mask, random.Random(name)
    batch = Batch(((700, 700), (100, 300), (1, 90)), ((), (), ()))
    cu_q, cu_k = batch.cu_q, batch.cu_k
    q, k, v = batch.tensors((4, 2), (128, 128), torch.bfloat16, "cuda")
    spans = {own: [random_spans(rng, keys)[:3] for _, keys in batch.seqlens] for own in sorted(mask.names)}
    if on_device:
        cu_q, cu_k = (torch.tensor(own, dtype=torch.int32, device="cuda") for own in (cu_q, cu_k))
        spans = {own: Batch(batch.seqlens, tuple(given)).ranges_tensor().cuda() for own, given in spans.items()}
    where = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    first = fp.plan(spans, like=(q, k, v), mask=mask, **where)  # it compiles
    # cuDNN reads its plan back, as its page says.
    backend = "flex" if first.choice.name == "cudnn" else "auto"
    fp.plan(spans, like=(q, k, v), mask=mask, backend=backend, **where)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fp.plan(spans, like=(q, k, v), mask=mask, backend=backend, **where)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_mask_with_its_own_kernel(gpu_report) -> None:
    from tests.masks.cute_masks import causal_to_allowed_keys

    batch = Batch(((700, 700), (200, 450), (1, 90)), ((), (), ()))
    keys = batch.cu_k[-1]
    allowed = (torch.rand(keys + 256, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) < 0.3).int()
    allowed[:64] = 1
    offset = torch.tensor(batch.cu_k[:-1], device="cuda")

    def twin(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (allowed[offset[b] + kv_idx] != 0)

    mask = from_cute(causal_to_allowed_keys, aux_tensors=[allowed], twin=twin)
    ran = check(mask, batch, {}, Kind((128, 128)), 0, gpu_report, "own kernel")
    assert ran == {"varlen", "flex"}
