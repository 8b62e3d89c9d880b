"""Bad input names the argument, what was expected and what came; hints for mistakes that are often made."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fa4_prefixlm as fp
from fa4_prefixlm.integrations.vllm import GroupPlans
from fa4_prefixlm.masks import causal, from_flex, key_in, runs_of, same_span
from fa4_prefixlm.runtime import fallback_warnings

Q = torch.randn(2, 30, 4, 8)


def attend(q: torch.Tensor = Q, k: torch.Tensor | None = None, ranges: object = None, **options: object) -> object:
    k = q if k is None else k
    return fp.attention(q, k, k, ranges, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: attend(ranges=[[(2**33, 2**33 + 5)], []]),
            r"ranges\[0\]\[0\]: expected positions of at most 2147483647",
        ),
        (lambda: attend(max_range={"imag": 3}), r"max_range\['imag'\]: expected a span set that"),
        (lambda: attend(softcap=True), "softcap: expected a non-negative finite number.*True"),
        (
            lambda: attend(softmax_scale=torch.tensor(0.1)),
            r"softmax_scale: expected a positive finite number, got tensor\(0.1",
        ),
        (lambda: causal.show(seqlen=4).save("mask.what"), "path: expected the name of an image file, such as mask.png"),
        (lambda: attend(ranges=[(2, 6), (3, 9)]), r"ranges\[0\]\[0\]: .* \[\[\(2, 6\)\]\] and not \[\(2, 6\)\]"),
        (
            lambda: attend(Q[:1], ranges=[(2, 6), (3, 9)]),
            r"ranges: expected one list per sequence, 1, got 2: .*\[\[\(2, 6\)\]\] and not",
        ),
        (lambda: attend(ranges=[[[(2, 6)]], []]), r"ranges\[0\]\[0\]: .* one list too many"),
        (lambda: attend(ranges=[["ab"], []]), r"ranges\[0\]\[0\]: expected a pair of integers \(start, end\), got ab$"),
        (lambda: attend(mask=fp.PrefixLM), r"mask: .*got the class PrefixLM \(.*PrefixLM\(\.\.\.\)\)"),
        (lambda: attend(mask=lambda b, h, q, kv: q >= kv), r"mask: .*becomes a mask by from_flex"),
        (lambda: attend(mask="causal"), "mask: .*got 'causal'"),
        (lambda: attend(deterministic="yes"), "deterministic: expected True, False or None, got 'yes'"),
        (lambda: attend(cu_seqlens_q=[0, 30]), r"cu_seqlens_q: expected None with \(batch.*got \[0, 30\]"),
        (
            lambda: attend(cu_seqlens_q=torch.zeros(2, dtype=torch.int32)),
            r"cu_seqlens_q: expected None.*got a tensor of shape \(2,\)",
        ),
        (lambda: attend(seqused_k=[20]), "seqused_k: expected 2 entries, one per sequence, got 1"),
        (lambda: fp.plan(like=(Q, Q)), r"like: expected the tensors \(q, k, v\), got 2 of them"),
        (lambda: attend(max_seqlen_q=3), "max_seqlen_q: expected at least the longest sequence, 30, got 3"),
        (lambda: attend(max_seqlen_k=True), "max_seqlen_k: expected a non-negative integer, got True"),
        (lambda: attend(out=torch.empty_like(Q, requires_grad=True)), "out: expected a tensor without requires_grad"),
        (lambda: attend(torch.empty(2, 30, 4, 8, device="meta")), "q, k, v: expected tensors with values.*meta"),
        (
            lambda: attend(torch.randn(2, 8, 100, 16), torch.randn(2, 4, 200, 16)),
            r"q: expected .*\(batch, heads, seqlen, head_dim\) goes in as tensor.transpose\(1, 2\)",
        ),
        (
            lambda: attend(torch.randn(2, 8, 100, 16), torch.randn(2, 4, 100, 16)),
            r"q: expected .*\(batch, heads, seqlen, head_dim\) goes in as tensor.transpose\(1, 2\)",
        ),
        (lambda: runs_of(torch.zeros(1, 3, dtype=torch.int64), 1), r"values: expected a collection.*\{1\}, got 1"),
        (lambda: causal.show(seqlen=-3), "seqlen: expected a number of tokens, at least 0, got -3"),
        (lambda: causal.dense(seqlen=8, seqlen_q=9), "seqlen_q: expected at most seqlen = 8"),
        (lambda: causal.flex(seqlen=8, seqlen_q=9), "seqlen_q: expected at most seqlen = 8"),
        (lambda: same_span("image").count({"img": 3}), r"spans: expected a number of spans of 'image', got .*img"),
        (lambda: key_in("image").count({"img": 3}), r"spans: expected a number of spans of 'image', got .*img"),
        (
            lambda: attend(mask=from_flex(lambda b, h, q, kv: torch.stack([kv <= q, kv < q]))),
            r"mask_mod: expected one boolean, of shape \(\), for every pair, got shape \(2,\)",
        ),
        (lambda: attend(Q, None, fp.PrefixLM()), "ranges: expected spans; a mask goes to mask="),
    ],
)
def test_bad_input(call, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(fp.InputError, match=text):
        call()


def test_fake_tensors_outside_of_a_trace() -> None:
    with FakeTensorMode(), pytest.raises(fp.InputError, match="tensors with values.*a fake tensor"):
        attend(torch.empty(1, 8, 2, 8))


def test_arguments_beside_a_plan() -> None:
    plan = fp.plan(None, like=(Q, Q, Q))
    with pytest.raises(fp.InputError, match=r"^mask: expected None beside a plan, which has its own"):
        fp.attention(Q, Q, Q, plan, mask=causal)


@pytest.mark.parametrize(
    ("combine", "text"),
    [
        (lambda: ~causal, "no complement.*from_flex"),
        (lambda: causal & True, "mask & bool.*from_flex"),
        (lambda: causal | None, "mask | NoneType.*from_flex"),
        (lambda: True & causal, "mask & bool.*from_flex"),
    ],
)
def test_what_is_no_mask_is_not_combined(combine, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypeError, match=text):
        combine()


class TestServing:
    cache = torch.randn(6, 4, 2, 8)
    q = torch.randn(16, 4, 8)

    def plan(self, mask: fp.Mask | None = None) -> fp.ServingPlan:
        return fp.serving_plan(
            like=(self.q, self.cache, self.cache),
            max_tokens=16,
            max_sequences=2,
            max_pages=4,
            mask=causal if mask is None else mask,
        )

    def update(self, plan: fp.ServingPlan, **change: object) -> None:
        given = {"cu_seqlens_q": [0, 3, 5], "seqused_k": [9, 4], "page_table": torch.tensor([[0, 1, 5], [2, -9, -9]])}
        plan.update(**{**given, **change})  # type: ignore[arg-type]

    def test_pages_that_the_cache_does_not_have(self) -> None:
        plan = self.plan()
        self.update(plan)
        plan(self.q[:5], self.cache, self.cache)
        self.update(plan, page_table=torch.tensor([[0, 1, 6], [2, 9, 9]]))
        with pytest.raises(fp.InputError, match="k: expected a cache of at least 7 pages.*got 6 pages"):
            plan(self.q[:5], self.cache, self.cache)
        with pytest.raises(fp.InputError, match=r"page_table\[1\]: expected pages of at least 0, got -1"):
            self.update(plan, page_table=torch.tensor([[0, 1, 5], [-1, 0, 0]]))

    def test_over_the_limits(self) -> None:
        with pytest.raises(fp.InputError, match=r"cu_seqlens_q\[-1\]: expected at most 16 tokens.*got 17"):
            self.update(self.plan(), cu_seqlens_q=[0, 3, 17], seqused_k=[9, 14])

    @pytest.mark.parametrize("mask", [causal, from_flex(lambda b, h, q, kv: kv <= q)], ids=["in place", "rebuilt"])
    def test_a_call_before_the_first_update(self, mask: fp.Mask) -> None:
        plan = self.plan(mask)
        out = torch.full((7, 4, 8), 3.0)
        result, lse = plan(self.q[:7], self.cache, self.cache, out=out, return_lse=True)
        assert result is out
        assert (out == 0).all(), "there is no batch yet"
        assert (lse == -torch.inf).all()


def test_vllm_refuses_what_has_no_kernel() -> None:
    options = {"max_tokens": 8, "max_requests": 2, "max_blocks": 2, "block_size": 4, "num_heads": 2, "num_kv_heads": 1}
    for dtype in ("fp8", torch.float8_e4m3fn, torch.int8):
        with pytest.raises(fp.InputError, match="dtype: expected one of torch.bfloat16.*fp8"):
            GroupPlans({"a": causal}, head_dim=8, dtype=dtype, device="cpu", **options)  # type: ignore[arg-type]
    plans = GroupPlans({"a": causal}, head_dim=8, dtype=torch.float32, device="cpu", **options)
    lengths = {"query_start_loc": torch.tensor([0, 2], dtype=torch.int32), "query_start_loc_cpu": [0, 2]}
    keys = {"seq_lens": torch.tensor([2], dtype=torch.int32), "seq_lens_cpu": [2]}
    with pytest.raises(fp.InputError, match="mm_ranges: expected a dictionary.*got list"):
        plans.update(**lengths, **keys, block_table=torch.zeros(1, 1, dtype=torch.int32), mm_ranges=[(0, 1)])  # type: ignore[arg-type]


def test_warnings_point_at_the_callers_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback_warnings, "_warned", set())
    monkeypatch.setenv("FLASH_ATTENTION_ARCH", "sm_75")
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        q = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
        fp.plan([[(0, 4)]], like=(q, q, q))
    assert re.search("dense reference", str(caught[0].message))
    assert caught[0].filename == __file__
