"""Inputs that have an answer get it: static caches, cross-attention, rows and steps that see nothing, wide integers."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.masks import causal, from_flex, in_documents, key_in, same_span, window
from fa4_prefixlm.masks.dense import dense_mask


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Torch's own attention of one sequence, `(seqlen, heads, head_dim)`, under a dense mask."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return out[0].transpose(0, 1)


class TestStaticCache:
    """`(batch, max_seqlen, kv_heads, head_dim)` with `seqused_k`: what a static cache of `generate` is."""

    mask, ranges, used = fp.PrefixLM(9), [[(2, 8)], [(11, 15)], []], [12, 20, 5]

    def tensors(self, rows: int) -> list[torch.Tensor]:
        return [normal(3, rows, 4, 8), normal(3, 32, 2, 8, seed=1), normal(3, 32, 2, 8, seed=2)]

    def wanted(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outs = []
        for index, keys in enumerate(self.used):
            visible = dense_mask(self.mask, q.shape[1], keys, {"image": tuple(self.ranges[index])})
            outs.append(sdpa(q[index], k[index, :keys], v[index, :keys], visible))
        return torch.stack(outs)

    @pytest.mark.parametrize("rows", [1, 5])
    def test_batched(self, rows: int) -> None:
        q, k, v = self.tensors(rows)
        k[0, 12:], v[1, 20:] = torch.nan, torch.nan  # room that is not filled yet is not read
        given = (self.used, torch.tensor(self.used, dtype=torch.int32), torch.tensor(self.used), np.array(self.used))
        for used in given:
            out, lse = fp.attention(q, k, v, self.ranges, mask=self.mask, seqused_k=used, return_lse=True)
            torch.testing.assert_close(out, self.wanted(q, k, v))
            assert lse.shape == (3, 4, rows)

    def test_packed_queries_and_a_plan(self) -> None:
        q, k, v = self.tensors(4)
        packed = q.flatten(0, 1)
        plan = fp.plan(
            self.ranges, like=(packed, k, v), mask=self.mask, cu_seqlens_q=[0, 4, 8, 12], seqused_k=self.used
        )
        torch.testing.assert_close(plan(packed, k, v), self.wanted(q, k, v).flatten(0, 1))

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"seqused_k": [12, 33, 5]}, r"seqused_k\[1\]: expected 0 to 32 keys, which the cache has room for"),
            ({"seqused_k": [12, 20]}, "seqused_k: expected 3 entries"),
            ({"seqused_k": [12, 20, 3]}, r"seqused_k\[2\]: expected at least the sequence's 4 queries"),
            ({"cu_seqlens_k": [0, 1, 2, 3]}, r"cu_seqlens_k: expected None with seqused_k"),
            ({"cu_seqlens_q": [0, 4, 8, 12]}, r"cu_seqlens_q: expected None with \(batch, seqlen"),
            ({"seqused_k": [12.0, 20.0, 5.0]}, "a list of batch integers"),
        ],
    )
    def test_bad_input(self, change: dict, text: str) -> None:
        q, k, v = self.tensors(4)
        with pytest.raises(fp.InputError, match=text):
            fp.attention(q, k, v, self.ranges, **{"seqused_k": self.used, **change})


class TestMoreQueriesThanKeys:
    """Cross-attention: plain where the mask does not use its own position."""

    q, k, v = normal(10, 4, 8), normal(4, 2, 8, seed=1), normal(4, 2, 8, seed=2)
    where: ClassVar = {"cu_seqlens_q": [0, 10], "cu_seqlens_k": [0, 4]}

    def test_key_in(self) -> None:
        visible = torch.tensor([False, True, True, False]).expand(10, 4)
        wanted = sdpa(self.q, self.k, self.v, visible)
        for ranges in ([[(1, 3)]], torch.tensor([[(1, 3)]])):
            out = fp.attention(self.q, self.k, self.v, ranges, mask=key_in("source"), **self.where)
            torch.testing.assert_close(out, wanted)
        batched = fp.attention(self.q[None], self.k[None], self.v[None], [[(1, 3)]], mask=key_in("source"))
        torch.testing.assert_close(batched[0], wanted)
        assert torch.equal(key_in("source").dense(seqlen=4, seqlen_q=10, ranges=[(1, 3)]), visible)

    def test_a_cache(self) -> None:
        wanted = sdpa(self.q, self.k[:3], self.v[:3], torch.tensor([False, True, True]).expand(10, 3))
        out = fp.attention(self.q[None], self.k[None], self.v[None], [[(1, 3)]], mask=key_in("source"), seqused_k=[3])
        torch.testing.assert_close(out[0], wanted)

    @pytest.mark.parametrize("mask", [fp.PrefixLM(), causal & key_in("image"), from_flex(lambda b, h, q, kv: kv < 2)])
    def test_masks_that_use_positions_are_refused(self, mask: fp.Mask) -> None:
        ranges = [[(1, 3)]] if mask.names else None
        with pytest.raises(fp.InputError, match="seqlen_q"):
            fp.attention(self.q, self.k, self.v, ranges, mask=mask, **self.where)
        with pytest.raises(fp.InputError, match="seqlen_q"):
            mask.dense(seqlen=4, seqlen_q=10)


@pytest.mark.parametrize(
    ("mask", "ranges"),
    [
        (same_span("image"), [[], []]),
        (same_span("image"), None),
        (causal & key_in("real"), [[], []]),
        (from_flex(lambda b, h, q, kv: kv < 0), None),
        (in_documents(causal), [[], [(2, 6)]]),
    ],
    ids=lambda value: repr(value).split(" at 0x")[0],
)
def test_a_step_that_sees_nothing_gives_0(mask: fp.Mask, ranges: object) -> None:
    q, k = normal(12, 2, 8), normal(12, 2, 8, seed=1)
    cu = [0, 5, 12]
    out, lse = fp.attention(q, k, k, ranges, mask=mask, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
    blind = torch.ones(12, dtype=torch.bool)
    if isinstance(ranges, list) and any(ranges):
        blind[5 + 2 : 5 + 6] = False
    assert (out[blind] == 0).all()
    assert (lse[:, blind] == -torch.inf).all()
    assert lse[:, ~blind].isfinite().all()


class TestIntegers:
    """int64 and numpy arrays on the host are cast where their values fit."""

    q = normal(12, 2, 8)
    wanted = fp.attention(q, q, q, [[(1, 3)], [(0, 4)]], cu_seqlens_q=[0, 5, 12], cu_seqlens_k=[0, 5, 12])

    @pytest.mark.parametrize("make", [torch.tensor, np.array, lambda values: np.array(values, dtype=np.int32)])
    def test_accepted(self, make) -> None:  # type: ignore[no-untyped-def]
        cu = make([0, 5, 12])
        out = fp.attention(self.q, self.q, self.q, make([[(1, 3)], [(0, 4)]]), cu_seqlens_q=cu, cu_seqlens_k=cu)
        assert torch.equal(out, self.wanted)

    @pytest.mark.parametrize(
        ("cu", "text"),
        [
            (torch.tensor([0, 5, 2**31]), "values that fit int32"),
            (torch.tensor([0.0, 5.0, 12.0]), "dtype torch.int32 or torch.int64"),
            (np.array([0.0, 5.0, 12.0]), "dtype torch.int32 or torch.int64"),
            (np.array(["a", "b"]), "expected integers"),
            ([0.0, 5.0], "a list of batch \\+ 1 integers"),
        ],
        ids=str,
    )
    def test_refused(self, cu: object, text: str) -> None:
        with pytest.raises(fp.InputError, match=text):
            fp.attention(self.q, self.q, self.q, None, cu_seqlens_q=cu, cu_seqlens_k=[0, 5, 12])

    def test_serving(self) -> None:
        cache = normal(4, 4, 2, 8, seed=3)
        plan = fp.serving_plan(like=(self.q, cache, cache), max_tokens=8, max_sequences=2, max_pages=2)
        outs = []
        for make in (lambda values: values, torch.tensor, np.array):
            table = torch.tensor([[0, 1], [2, 3]]) if make is not np.array else np.array([[0, 1], [2, 3]])
            plan.update([[], [(1, 3)]], cu_seqlens_q=make([0, 2, 5]), seqused_k=make([6, 3]), page_table=table)
            outs.append(plan(self.q[:5], cache, cache))
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


def test_spans_to_come_are_passed_over_everywhere() -> None:
    """One rule for contiguous keys and for pages: a span past the keys is not here yet."""
    q = normal(10, 2, 8)
    where: ClassVar = {"cu_seqlens_q": [0, 10], "cu_seqlens_k": [0, 10]}
    out = fp.attention(q, q, q, [[(2, 5), (10, 14), (20, 30)]], **where)
    assert torch.equal(out, fp.attention(q, q, q, [[(2, 5)]], **where))
    with pytest.raises(fp.InputError, match=r"ranges\[0\]: .* end within the 10 keys.*safe_chunk_end"):
        fp.attention(q, q, q, [[(2, 5), (8, 14)]], **where)
    assert torch.equal(
        fp.attention(q[None], q[None], q[None], [[(2, 5), (12, 14)]], mask=fp.PrefixLM(4))[0],
        fp.attention(q, q, q, [[(2, 5)]], mask=(causal | same_span()) & window(4), **where),
    )
