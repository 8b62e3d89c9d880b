"""Keys in pages on the CPU: the reference over gathered keys, and what is refused."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.backends import gathered
from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.batch import lengths, ranges
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.tensors import CallSpec, describe
from fa4_prefixlm.masks import causal, same_span, window
from fa4_prefixlm.testing.accuracy import exact_attention
from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch, random_mask
from fa4_prefixlm.testing.pages import ShuffledPages
from fa4_prefixlm.testing.stages import Stages, prepare


def paged(batch: Batch, page_size: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64):
    q, k, v = batch.tensors((4, 2), (16, 24), dtype, "cpu", seed)
    return q, k, v, batch.in_pages(k, v, page_size, seed)


def where(batch: Batch, pages: ShuffledPages) -> dict[str, object]:
    return {"cu_seqlens_q": batch.cu_q, "seqused_k": list(batch.as_seqlens[1]), "page_table": pages.table}


@pytest.mark.parametrize("page_size", [1, 16, 80, 1000])
def test_paged_attention_is_contiguous_attention(page_size: int) -> None:
    for seed in range(12):
        rng = random.Random(f"{page_size}{seed}")
        batch, mask = random_batch(rng, longest=200), random_mask(rng)
        q, k, v, pages = paged(batch, page_size, seed)
        out, lse = fp.attention(q, pages.k, pages.v, batch.spans, mask=mask, return_lse=True, **where(batch, pages))
        exact, exact_lse = exact_attention(q, k, v, mask=mask, spans=batch.spans, seqlens=batch.as_seqlens)
        torch.testing.assert_close(out, exact)
        torch.testing.assert_close(lse, exact_lse.float())


@pytest.mark.parametrize("backend", ["reference", "flex"])
@pytest.mark.parametrize("size", [2**31 + 25, 2**33, 2**63, 2**64])
def test_windows_wider_than_int32(size: int, backend: str) -> None:
    """They are none."""
    batch = Batch(((20, 20), (1, 30)), (((2, 18),), ()))
    q, k, v, pages = paged(batch, dtype=torch.float32)
    packed = {"cu_seqlens_q": batch.cu_q, "cu_seqlens_k": batch.cu_k}
    for wide, mask in (
        (fp.PrefixLM(size), fp.PrefixLM()),
        ((causal & window(size)) | same_span("image"), fp.PrefixLM()),
        ((causal & window(5)) | same_span("image", before=size), (causal & window(5)) | same_span("image", before=99)),
    ):
        wanted = fp.attention(q, k, v, batch.spans, mask=mask, **packed)
        found = fp.attention(q, pages.k, pages.v, batch.spans, mask=wide, backend=backend, **where(batch, pages))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fp.attention(q, k, v, batch.spans, mask=wide, **packed), wanted)


@pytest.mark.parametrize("name", UGLY)
def test_what_is_copied_holds_every_visible_key(name: str) -> None:
    """The trimmed work sees the same keys: its dense masks are those of the whole, from `first_key` on."""
    for mask in (fp.PrefixLM(), fp.PrefixLM(40), fp.PrefixLM(40, clamp=False)):
        batch = UGLY[name]
        stages = prepare(batch, mask)
        q, _, _, pages = paged(batch)
        spec = describe(q, pages.k, pages.v, cache="pages")
        work = masked_batch(spec, mask, stages, pages)
        inner, first_key = gathered.contiguous(work, trim=True)
        by = first_key[stages.where.sequence.long()][:, None]
        seen = stages.bounds.lo < stages.bounds.hi
        assert torch.equal((inner.bounds.lo + by)[seen], stages.bounds.lo[seen])
        assert torch.equal((inner.bounds.hi + by)[seen], stages.bounds.hi[seen])
        assert (inner.bounds.lo[seen] >= 0).all()
        assert inner.lengths.cu_seqlens_k.diff().tolist() == list(inner.lengths.seqlens_k or ())
        assert inner.lengths.total_k == int(inner.lengths.cu_seqlens_k[-1])
        skipped = [keys - kept for (_, keys), kept in zip(batch.seqlens, inner.lengths.seqlens_k or (), strict=True)]
        assert first_key.tolist() == skipped
        if mask.window is None:
            assert not any(skipped)


def masked_batch(spec: CallSpec, mask: fp.Mask, stages: Stages, pages: ShuffledPages) -> MaskedBatch:
    keys = Keys.in_pages(pages.table, stages.sizes, pages.k.shape[1], len(pages.k))
    return MaskedBatch(spec, mask, stages.spans, stages.sizes, stages.traits, keys)


def test_a_window_copies_little() -> None:
    batch = Batch(((50, 1000),), (((960, 980),),))
    q, _, _, pages = paged(batch)
    plan = fp.plan(batch.spans, like=(q, pages.k, pages.v), mask=fp.PrefixLM(100), **where(batch, pages))
    assert plan.choice.gathered
    assert "1000 keys out of the cache" in str(plan)  # the reference looks at positions: it takes them all
    stages = prepare(batch, fp.PrefixLM(100))
    spec = describe(q, pages.k, pages.v, cache="pages")
    work = masked_batch(spec, plan.mask, stages, pages)
    assert gathered.contiguous(work, trim=True)[0].lengths.total_k == 50 + 99


def test_spans_ahead_wait_and_spans_that_are_cut_raise() -> None:
    batch = Batch(((40, 100),), (((10, 20), (70, 90)),))
    q, k, v, pages = paged(batch)
    now = fp.attention(q, pages.k, pages.v, [[(10, 20), (70, 90), (100, 140)]], **where(batch, pages))
    assert torch.equal(now, fp.attention(q, pages.k, pages.v, batch.spans, **where(batch, pages)))
    with pytest.raises(fp.InputError, match="safe_chunk_end"):
        fp.attention(q, pages.k, pages.v, [[(90, 140)]], **where(batch, pages))
    later = fp.attention(q, k, v, [[(100, 140)]], cu_seqlens_q=[0, 40], cu_seqlens_k=[0, 100])
    assert torch.equal(later, fp.attention(q, k, v, None, cu_seqlens_q=[0, 40], cu_seqlens_k=[0, 100]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_table": None}, r"k: expected a static cache of 2 sequences \(or a page_table"),
        ({"seqused_k": None}, r"seqused_k: expected int32 values"),
        ({"cu_seqlens_q": None}, r"cu_seqlens_q: expected int32 values"),
        ({"cu_seqlens_k": [0, 60, 160]}, r"cu_seqlens_k: expected None with a page_table"),
        ({"seqused_k": [60, 30]}, r"seqused_k\[1\]: expected at least the sequence's 40 queries, got 30"),
        ({"seqused_k": [60, 10**6]}, r"seqused_k\[1\]: expected 0 to \d+ keys"),
        ({"seqused_k": [60]}, r"seqused_k: expected 2 entries"),
        ({"page_table": torch.zeros(3, 9, dtype=torch.int32)}, r"page_table: expected shape \(2, max_pages\)"),
        ({"page_table": torch.zeros(2, 9)}, r"page_table: expected dtype torch.int32"),
        ({"page_table": torch.full((2, 9), 10**6, dtype=torch.int32)}, r"page_table\[0\]: expected pages of 0 to"),
        ({"page_table": [[0]]}, r"page_table: expected an int32 tensor"),
        ({"build": "no.such.module"}, r"build: expected an importable FA4"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    batch = Batch(((60, 60), (40, 100)), ((), ()))
    q, _, _, pages = paged(batch)
    with pytest.raises(fp.InputError, match=message):
        fp.attention(q, pages.k, pages.v, **{**where(batch, pages), **change})


@pytest.mark.parametrize(("entry", "holds_a_key"), [(6, True), (7, False)])
def test_every_page_that_holds_a_key_is_checked_and_no_other(entry: int, holds_a_key: bool) -> None:
    """Of 100 keys in pages of 16 the seventh holds four."""
    batch = Batch(((40, 100),), ((),))
    q, _, _, pages = paged(batch, page_size=16)
    table = torch.cat([pages.table[:, :7], pages.table[:, :1]], dim=1)
    where_else = {**where(batch, pages), "page_table": table}
    table[0, entry] = -1
    if holds_a_key:
        with pytest.raises(fp.InputError, match=r"page_table\[0\]: expected pages of 0 to \d+, got -1"):
            fp.attention(q, pages.k, pages.v, **where_else)
    else:
        fp.attention(q, pages.k, pages.v, **where_else)


def test_bad_shapes() -> None:
    batch = Batch(((60, 60),), ((),))
    q, k, v, pages = paged(batch)
    with pytest.raises(fp.InputError, match=r"k: expected \(pages, page_size, kv_heads, head_dim\) with a page_table"):
        fp.attention(q, k, v, **where(batch, pages))
    with pytest.raises(fp.InputError, match=r"q: expected \(total_q, heads, head_dim\) with a page_table"):
        fp.attention(q[None], pages.k, pages.v, **where(batch, pages))


def test_gradients_reach_the_pages() -> None:
    batch = Batch(((20, 30),), (((12, 25),),))
    q, k, v, pages = paged(batch)
    inputs = [tensor.nan_to_num(0.0).requires_grad_() for tensor in (q, pages.k, pages.v)]
    fp.attention(*inputs, batch.spans, **where(batch, pages)).sum().backward()
    flat = [tensor.requires_grad_() for tensor in (q.detach().clone(), k, v)]
    fp.attention(*flat, batch.spans, cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k).sum().backward()
    torch.testing.assert_close(inputs[0].grad, flat[0].grad)
    for paged_grad, grad in ((inputs[1].grad, k.grad), (inputs[2].grad, v.grad)):
        own = paged_grad[pages.table[0, :2].long()].flatten(0, 1)[:30]
        torch.testing.assert_close(own, grad)
        torch.testing.assert_close(paged_grad.sum(), grad.sum())


def test_spans_ahead_of_keys_that_only_the_device_knows() -> None:
    """As on a GPU: lengths and spans unknown to the host, and a span to come that is longer than all keys so far."""
    sizes = lengths.cached(
        [0, 100], [100], total_q=100, capacity=128, max_seqlen_q=None, max_seqlen_k=None, device=torch.device("cpu")
    )
    ahead, cut = (torch.tensor([[span]], dtype=torch.int32) for span in ((100, 356), (90, 128)))
    ranges._assert_on_device(ahead, sizes, sizes.max_seqlen_k, "span")
    with pytest.raises(RuntimeError, match="cut by the end of its keys"):
        ranges._assert_on_device(cut, sizes, sizes.max_seqlen_k, "span")
    unknown = dataclasses.replace(sizes, seqlens_q=None, seqlens_k=None, max_seqlen_k=128)
    assert ranges.parse(fp.PrefixLM(), [[(100, 356)]], unknown)["image"].host == (((100, 356),),)
    many = dataclasses.replace(unknown, total_k=2**40)
    many.assert_valid()


def test_a_page_table_on_the_host_is_copied() -> None:
    batch = Batch(((60, 60),), ((),))
    q, _, _, pages = paged(batch)
    plan = fp.plan(None, like=(q, pages.k, pages.v), **where(batch, pages))
    before = fp.attention(q, pages.k, pages.v, plan)
    pages.table.zero_()
    assert torch.equal(fp.attention(q, pages.k, pages.v, plan), before)
