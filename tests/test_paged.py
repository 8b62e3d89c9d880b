"""Keys in pages, serving plans and chunks on the CPU: the reference over gathered keys, and what is refused."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import shutil

import pytest
import torch
from cases import UGLY, Batch, Pages, Stages, prepare, random_batch, random_mask

import fa4_prefixlm as fp
from fa4_prefixlm.backends import gathered
from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.batch import lengths, ranges
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.tensors import CallSpec, describe
from fa4_prefixlm.fa4.builds import fingerprint
from fa4_prefixlm.geometry.tiles import query_tiles, tile_runs, tile_slots
from fa4_prefixlm.geometry.traits import CausalWindow
from fa4_prefixlm.geometry.traits import traits as traits_of
from fa4_prefixlm.masks import causal, prefix, same_span, window
from fa4_prefixlm.testing.accuracy import exact_attention


def paged(batch: Batch, page_size: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64):
    q, k, v = batch.tensors((4, 2), (16, 24), dtype, "cpu", seed)
    return q, k, v, Pages.of(batch, k, v, page_size, seed)


def where(batch: Batch, pages: Pages) -> dict[str, object]:
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


def masked_batch(spec: CallSpec, mask: fp.Mask, stages: Stages, pages: Pages) -> MaskedBatch:
    keys = Keys.in_pages(pages.table, stages.sizes, pages.k.shape[1], len(pages.k))
    return MaskedBatch(spec, mask, stages.spans, stages.sizes, stages.traits, stages.where, stages.bounds, keys)


def test_a_window_copies_little() -> None:
    batch = Batch(((50, 1000),), (((960, 980),),))
    q, _, _, pages = paged(batch)
    plan = fp.plan(batch.spans, like=(q, pages.k, pages.v), mask=fp.PrefixLM(100), **where(batch, pages))
    assert plan.choice.gathered
    assert "1000 keys out of their pages" in str(plan)  # the reference looks at positions: it takes them all
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
    lengths._assert_on_device(many, more_queries=False, exact_total_k=False)


def test_a_page_table_on_the_host_is_copied() -> None:
    batch = Batch(((60, 60),), ((),))
    q, _, _, pages = paged(batch)
    plan = fp.plan(None, like=(q, pages.k, pages.v), **where(batch, pages))
    before = fp.attention(q, pages.k, pages.v, plan)
    pages.table.zero_()
    assert torch.equal(fp.attention(q, pages.k, pages.v, plan), before)


class TestServing:
    """On the CPU a serving plan makes a new plan for every batch."""

    def plan(self, q, pages: Pages, mask: fp.Mask = fp.PrefixLM()) -> fp.ServingPlan:  # noqa: B008
        return fp.serving_plan(like=(q, pages.k, pages.v), max_tokens=2000, max_sequences=6, max_pages=200, mask=mask)

    def test_updates(self) -> None:
        serving = None
        for seed in range(6):
            batch = random_batch(random.Random(seed), longest=150)
            q, k, v, pages = paged(batch, seed=seed)
            serving = serving or self.plan(q, pages, fp.PrefixLM(30))
            serving.update([list(own) for own in batch.spans], **where(batch, pages))
            exact, _ = exact_attention(q, k, v, mask=fp.PrefixLM(30), spans=batch.spans, seqlens=batch.as_seqlens)
            torch.testing.assert_close(fp.attention(q, pages.k, pages.v, serving), exact)
        assert serving is not None
        assert not serving.in_place
        assert "at most  6 sequences, 2000 queries, 3200 keys each" in str(serving)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"cu_seqlens_q": [0, 5, 5, 5, 5, 5, 5, 5]}, "as max_sequences allows"),
            ({"seqused_k": [5, 5]}, "seqused_k: expected 1 entries"),
            ({"cu_seqlens_q": [0, 2001]}, "the plan's max_tokens"),
            ({"total_q": 4}, "total_q: expected 60 to 2000"),
            ({"page_table": torch.zeros(1, 201, dtype=torch.int32)}, "at most 200 pages"),
            ({"cu_seqlens_q": torch.tensor([0.0, 60.0])}, "cu_seqlens_q: expected dtype torch.int32"),
            ({"ranges": [[(50, 70)]]}, "safe_chunk_end"),
        ],
    )
    def test_bad_updates(self, change: dict[str, object], message: str) -> None:
        batch = Batch(((60, 60),), ((),))
        q, _, _, pages = paged(batch)
        with pytest.raises(fp.InputError, match=message):
            self.plan(q, pages).update(**{**where(batch, pages), **change})

    def test_the_cache_may_have_more_pages_than_like(self) -> None:
        batch = Batch(((60, 60),), (((3, 50),),))
        q, _, _, pages = paged(batch)
        serving = fp.serving_plan(like=(q, pages.k[:1], pages.v[:1]), max_tokens=99, max_sequences=2, max_pages=200)
        assert "not " in str(serving)  # before a batch, too
        serving.update(batch.spans, **where(batch, pages))
        once = fp.attention(q, pages.k, pages.v, batch.spans, **where(batch, pages))
        assert torch.equal(fp.attention(q, pages.k, pages.v, serving), once)

    def test_bad_calls(self) -> None:
        batch = Batch(((60, 60),), ((),))
        q, _, _, pages = paged(batch)
        serving = self.plan(q, pages)
        with pytest.raises(fp.InputError, match="takes no rows past it"):
            serving.update(**where(batch, pages), total_q=61)
        serving.update(**where(batch, pages))
        for bad in (q[:59], q.float(), q[:, :2]):
            with pytest.raises(fp.InputError):
                fp.attention(bad, pages.k, pages.v, serving)
        with pytest.raises(fp.InputError, match="page_size = 16"):
            fp.attention(q, pages.k[:, :8], pages.v[:, :8], serving)
        for name in ("max_tokens", "max_sequences", "max_pages"):
            sizes = {"max_tokens": 9, "max_sequences": 9, "max_pages": 9, name: 0}
            with pytest.raises(fp.InputError, match=name):
                fp.serving_plan(like=(q, pages.k, pages.v), **sizes)


@pytest.mark.parametrize(
    ("position", "spans", "end"),
    [
        (100, [], 100),
        (100, [(0, 100), (100, 200)], 100),
        (100, [(40, 101)], 40),
        (100, [(99, 300)], 99),
        (100, [(0, 101)], 0),
        (41, [(60, 70), (40, 50), (10, 41)], 10),
        (0, [(0, 9)], 0),
    ],
)
def test_safe_chunk_end(position: int, spans: list[tuple[int, int]], end: int) -> None:
    assert fp.safe_chunk_end(position, spans) == end


def test_safe_chunks_are_accepted_by_a_plan() -> None:
    """What the helper returns, `plan` takes; a position inside a span it refuses."""
    spans = [(5, 30), (30, 31), (50, 90)]
    for position in range(1, 101):
        end = fp.safe_chunk_end(position, spans)
        assert end <= position
        cut = any(start < position < stop for start, stop in spans)
        assert (end < position) == cut
        for keys, refused in ((end, False), (position, cut)):
            if keys == 0:
                continue
            q, _, _, pages = paged(Batch(((1, keys),), ((),)))
            given = {"cu_seqlens_q": [0, 1], "seqused_k": [keys], "page_table": pages.table}
            if refused:
                with pytest.raises(fp.InputError):
                    fp.plan([spans], like=(q, pages.k, pages.v), **given)
            else:
                fp.plan([spans], like=(q, pages.k, pages.v), **given)
    for bad in ((-1, []), (1.5, []), (3, [(4, 2)])):
        with pytest.raises(fp.InputError):
            fp.safe_chunk_end(*bad)


@pytest.mark.parametrize(
    ("mask", "spans", "found"),
    [
        (fp.PrefixLM(), (), CausalWindow(None)),
        (fp.PrefixLM(7), ((3, 60),), CausalWindow(7)),  # behind the queries, which begin at 60
        (fp.PrefixLM(7), ((3, 61),), None),
        (fp.PrefixLM(7, clamp=False), ((60, 61),), None),
        (causal, None, CausalWindow(None)),
        (causal & window(9), None, CausalWindow(9)),
        ((causal & window(9)) | same_span("image"), ((0, 10),), CausalWindow(9)),
        (window(9), None, None),
        (causal & (prefix("image") | window(9)), ((0, 10),), None),
    ],
    ids=str,
)
def test_plain_batches(mask: fp.Mask, spans: tuple | None, found: CausalWindow | None) -> None:
    given: dict = {name: [spans, ((0, 50),)] for name in mask.names}
    stages = prepare(Batch(((40, 100), (0, 50)), ((), ())), mask, given)
    assert stages.traits.causal_only == found
    if spans and found:
        unknown = {name: dataclasses.replace(own, host=None) for name, own in stages.spans.items()}
        assert traits_of(mask, unknown, stages.sizes).causal_only is None


def test_plain_is_what_the_mask_is() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        batch, mask = random_batch(rng, longest=60), random_mask(rng)
        found = prepare(batch, mask).traits.causal_only
        for (rows, keys), own in zip(batch.seqlens, batch.spans, strict=True):
            seen = mask.dense(seqlen=keys, ranges=own, seqlen_q=rows)
            text = fp.PrefixLM(mask.window).dense(seqlen=keys, ranges=(), seqlen_q=rows)
            if found is not None:
                assert torch.equal(seen, text)


@pytest.mark.parametrize("block", [(42, 64), (64, 128), (128, 80)])
def test_tile_slots(block: tuple[int, int]) -> None:
    for seed in range(20):
        stages = prepare(random_batch(random.Random(seed), longest=400), fp.PrefixLM(50))
        where_tiles = query_tiles(stages.sizes, block[0])
        runs = tile_runs(stages.bounds, where_tiles, *block)
        slots = tile_slots(runs, where_tiles, stages.sizes, block[0])
        filled = 0
        for index, rows in enumerate(stages.sizes.seqlens_q or ()):
            for tile in range(-(-rows // block[0])):
                slot = int(stages.sizes.cu_seqlens_q[index]) // block[0] + index + tile
                at = int(where_tiles.cu_tiles[index]) + tile
                four = (runs.first, runs.full_first, runs.full_end, runs.end)
                assert slots[slot].tolist() == [int(part[at]) for part in four]
                filled += 1
        assert (slots.any(1)).sum() <= filled


def test_a_build_is_known_by_its_code(tmp_path: pathlib.Path) -> None:
    flash_attn = pytest.importorskip("flash_attn.cute.interface")
    here = pathlib.Path(flash_attn.__file__).parent
    for name in fingerprint.PARTS:
        shutil.copy(here / name, tmp_path / name)
    assert fingerprint.fingerprint(tmp_path) == fingerprint.fingerprint(here)
    known = fingerprint.native_refusal(here, "flash-attn-4 x") is None
    assert (fingerprint.native_refusal(tmp_path, "flash-attn-4 x") is None) == known
    for name, before, after in (
        ("block_info.py", "n_block_min = 0", "n_block_min = 1"),
        ("mask.py", "return col_limit // 8 * 2", "return col_limit // 8 * 4"),
        ("flash_fwd_sm90.py", "mask_seqlen=True", "mask_seqlen=False"),
    ):
        source = (tmp_path / name).read_text()
        assert before in source
        (tmp_path / name).write_text(source.replace(before, after, 1))
        assert "is not one that the native backend was run on" in str(fingerprint.native_refusal(tmp_path, "changed"))
        (tmp_path / name).write_text(source)
    (tmp_path / "mask.py").write_text(
        (tmp_path / "mask.py").read_text().replace("def sm90_col_to_r2p_idx", "def other")
    )
    assert "lacks parts" in str(fingerprint.native_refusal(tmp_path, "changed"))
