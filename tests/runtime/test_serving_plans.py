"""Serving plans on the CPU, and what is refused."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fa4_prefixlm as fp
from fa4_prefixlm.batch import ranges as ranges_module
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.masks import diffusion_gemma
from fa4_prefixlm.masks.closed_form import closed_form
from fa4_prefixlm.runtime import serving_plans
from fa4_prefixlm.testing.accuracy import exact_attention
from fa4_prefixlm.testing.batches import Batch, random_batch
from fa4_prefixlm.testing.pages import ShuffledPages


def paged(batch: Batch, page_size: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64):
    q, k, v = batch.tensors((4, 2), (16, 24), dtype, "cpu", seed)
    return q, k, v, batch.in_pages(k, v, page_size, seed)


def where(batch: Batch, pages: ShuffledPages) -> dict[str, object]:
    return {"cu_seqlens_q": batch.cu_q, "seqused_k": list(batch.as_seqlens[1]), "page_table": pages.table}


class TestServing:
    """On the CPU a serving plan makes a new plan for every batch."""

    def plan(self, q, pages: ShuffledPages, mask: fp.Mask = fp.PrefixLM()) -> fp.ServingPlan:  # noqa: B008
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
            ({"seqused_k": [10.5]}, r"seqused_k\[0\]: expected a non-negative integer, got 10.5"),
            ({"cu_seqlens_q": [0, "x"]}, r"cu_seqlens_q\[1\]: expected a non-negative integer, got 'x'"),
            ({"total_q": "15"}, "total_q: expected a non-negative integer, got '15'"),
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
        with pytest.raises(fp.InputError, match=f"max_pages: expected at most {2**27 - 1} pages of 16, got {2**27}"):
            fp.serving_plan(like=(q, pages.k, pages.v), max_tokens=9, max_sequences=9, max_pages=2**27)
        # Of whatever integer: numpy's int16 would wrap at 32768 keys.
        sizes = {"max_tokens": torch.tensor(9), "max_sequences": 9, "max_pages": np.int16(4096)}
        assert fp.serving_plan(like=(q, pages.k, pages.v), **sizes).limits == serving_plans.Limits(9, 9, 4096, 16)

    @pytest.mark.parametrize(
        ("heads", "dims", "dtype", "message"),
        [
            ((8, 2), (16, 24), torch.float64, "q: expected heads = 4, as the plan was made for, got 8"),
            ((4, 4), (16, 24), torch.float64, "k: expected heads = 2, as the plan was made for, got 4"),
            ((4, 2), (8, 24), torch.float64, "q: expected head_dim = 16, as the plan was made for, got 8"),
            ((4, 2), (16, 16), torch.float64, "v: expected head_dim_v = 24, as the plan was made for, got 16"),
            ((4, 2), (16, 24), torch.float32, r"q: expected dtype = torch.float64, .*, got torch.float32"),
        ],
    )
    def test_tensors_that_the_plan_is_not_for(
        self, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, message: str
    ) -> None:
        batch = Batch(((60, 60),), ((),))
        q, _, _, pages = paged(batch)
        serving = self.plan(q, pages)
        serving.update(**where(batch, pages))
        other, k, v = batch.tensors(heads, dims, dtype, "cpu")
        there = batch.in_pages(k, v, 16, seed=0)
        with pytest.raises(fp.InputError, match=f"^{message}"):
            fp.attention(other, there.k, there.v, serving)

    def test_a_device_that_the_plan_is_not_for(self) -> None:
        q, _, _, pages = paged(Batch(((60, 60),), ((),)))
        serving = self.plan(q, pages)
        with pytest.raises(fp.InputError, match="^q: expected device = cpu, as the plan was made for, got cuda:1"):
            serving.check(dataclasses.replace(serving.spec, device=torch.device("cuda", 1)))


@pytest.mark.parametrize(("keys", "pages"), [(0, 0), (1, 3), (15, 3), (16, 3), (17, 8), (32, 8), (33, 10)])
def test_pages_that_hold_keys_are_named(keys: int, pages: int) -> None:
    """Of 16 keys each. What the table has past them is not read."""
    table = torch.tensor([[2, 7, 9, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    assert serving_plans._pages_named(table, [keys, 0], 16) == pages
    assert serving_plans._pages_named(table, torch.tensor([keys, 0], dtype=torch.int32), 16) == pages


def test_pages_are_not_named_where_that_would_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    table, keys = torch.tensor([[2, 7]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    for there in (table, keys):
        monkeypatch.setattr(serving_plans, "host_knows", lambda values, there=there: values is not there)
        assert serving_plans._pages_named(table, keys, 16) == 0


@pytest.mark.parametrize("on_host", [True, False])
def test_the_spans_of_two_sets_are_read_in_the_order_of_the_form(on_host: bool, monkeypatch) -> None:
    """What an update in place hands to the launch, which needs a GPU; whoever knows the values."""
    mask = diffusion_gemma.encoder_local_layers(8, like="transformers-generate", canvas=True)
    batch = Batch(((60, 60), (20, 40)), ((), ()))
    q, _, _, pages = paged(batch)
    plan = TestServing().plan(q, pages, mask)
    state = object.__new__(serving_plans._InPlace)
    state._mask, state._form, state._limits, state._device = mask, closed_form(mask), plan.limits, q.device
    monkeypatch.setattr(serving_plans.ranges, "on_device", lambda given: not on_host)
    assert [own.span for own in state._form.inside] == ["canvas", "image"]
    image, canvas = [[(3, 9), (10, 12)], []], [[], [(30, 40)]]
    for ranges, wanted, plain in (
        ({"image": image, "canvas": canvas}, [canvas, image], False),
        ({"image": [[], [(1, 5)]], "canvas": None}, [None, [[], [(1, 5)]]], on_host),
        ({"image": None, "canvas": None}, [None, None], True),
    ):
        given = serving_plans._checked(ranges, *where(batch, pages).values(), None, plan)
        tensors, text_only = state._read(given)
        found = [None if own is None else ranges_module.Spans(own, None, 0).on_host() for own in tensors]
        assert found == [None if own is None else tuple(map(tuple, own)) for own in wanted]
        assert text_only == plain


@pytest.mark.filterwarnings("ignore:.*takes two_pass")
class TestWhatIsLaunched:
    """On Hopper, without one: over how many sequences a call is launched, alone and in a graph."""

    LARGEST = 64

    @pytest.fixture(params=["native", "two_pass"])
    def hopper(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        from fa4_prefixlm.kernels import row_update

        found = locate.installed("flash_attn.cute")
        if found is None:
            pytest.skip("flash-attn-4 is not installed")
        refusal = None if request.param == "native" else "not for this test"
        monkeypatch.setenv("FLASH_ATTENTION_ARCH", "sm_90")
        monkeypatch.setattr(
            serving_plans, "find_build", lambda module: dataclasses.replace(found, native_refusal=refusal)
        )
        monkeypatch.setattr(row_update, "update_rows", lambda *arguments, **named: None)
        with FakeTensorMode():
            yield request.param

    def plan(self, **how: bool) -> fp.ServingPlan:
        q, cache = (torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((9, 4, 64), (99, 16, 2, 64)))
        limits = {"max_tokens": 512, "max_sequences": self.LARGEST, "max_pages": 8}
        return fp.serving_plan(like=(q, cache, cache), mask=fp.PrefixLM(30), **limits, **how)

    def launched(self, plan: fp.ServingPlan) -> int:
        """Sequences of the next call."""
        call = plan.prepared
        if isinstance(call, serving_plans._BeforeTheFirst):
            call = call._inner
        call = getattr(call, "causal", call)
        sizes = {
            len(call.cu_seqlens_q) - 1,
            len(call.keys.seqused_k),
            len(call.keys.page_table),
        }
        return sizes.pop() if len(sizes) == 1 else -1

    def update(self, plan: fp.ServingPlan, sequences: int, *, spans: bool) -> None:
        starts, keys, table, ranges = (
            torch.empty(*shape, dtype=torch.int32, device="cuda")
            for shape in ((sequences + 1,), (sequences,), (sequences, 3), (sequences, 1, 2))
        )
        where = {"cu_seqlens_q": starts, "seqused_k": keys, "page_table": table, "total_q": 40}
        plan.update(ranges if spans else None, **where)

    @pytest.mark.parametrize("spans", [False, True])
    def test_a_call_is_as_large_as_its_batch(self, hopper: str, spans: bool) -> None:
        plan = self.plan()
        assert plan.choice.name == hopper
        assert self.launched(plan) == self.LARGEST
        for sequences in (3, 1, 3, self.LARGEST):
            self.update(plan, sequences, spans=spans)
            assert self.launched(plan) == sequences

    @pytest.mark.parametrize("any_batch", [True, False])
    def test_a_graph_is_as_large_as_what_it_replays(
        self, hopper: str, any_batch: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = self.plan(graphs_take_any_batch=any_batch)
        self.update(plan, 3, spans=False)
        alone = plan.prepared
        monkeypatch.setattr(serving_plans, "is_capturing", lambda: True)
        assert self.launched(plan) == (self.LARGEST if any_batch else 3)
        assert type(plan.prepared) is not type(alone), "a graph has the kernel of batches with spans"
