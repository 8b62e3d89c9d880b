"""A plan is called with tensors, in eager code and inside a compiled graph; `attention` with it is the same."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fa4_prefixlm as fp


def tensors() -> list[torch.Tensor]:
    return [torch.randn(60, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)]


def planned(spans: list[tuple[int, int]]) -> fp.Plan:
    return fp.plan([spans], like=tensors(), cu_seqlens_q=[0, 60], cu_seqlens_k=[0, 60])  # type: ignore[arg-type]


def test_a_call_is_attention_with_the_plan() -> None:
    q, k, v = tensors()
    plan, sink, out = planned([(3, 20)]), torch.randn(4), torch.empty(60, 4, 16)
    options = {"softmax_scale": 0.3, "softcap": 9.0, "learnable_sink": sink}
    wanted, wanted_lse = fp.attention(q, k, v, plan, return_lse=True, **options)
    result, lse = plan(q, k, v, return_lse=True, out=out, **options)
    assert result is out
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)
    assert torch.equal(plan(q, k, v, **options), wanted)
    with pytest.raises(fp.InputError, match="heads = 4, as the plan was made for"):
        plan(q[:, :2], k, v)


def test_other_plans_run_in_the_graph_of_the_first() -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: fp.Plan) -> torch.Tensor:
        return plan(q * 2, k, v) * 2

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(layer, fullgraph=True, backend=counter)
    for spans in ([(3, 9)], [(10, 40), (41, 50)], []):
        plan = planned(spans)
        assert torch.equal(run(*tensors(), plan), layer(*tensors(), plan))
    assert counter.frame_count == 1


def test_a_serving_plan_is_called_too() -> None:
    q, _, _ = tensors()
    cache = torch.randn(4, 16, 2, 16)
    plan = fp.serving_plan(like=(q, cache, cache), max_tokens=60, max_sequences=1, max_pages=4)
    plan.update([[(3, 9)]], cu_seqlens_q=[0, 20], seqused_k=[40], page_table=torch.arange(4)[None])
    assert torch.equal(plan(q[:20], cache, cache), fp.attention(q[:20], cache, cache, plan))
