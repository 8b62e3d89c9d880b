"""A plan runs only what it was made for."""

from __future__ import annotations

import re

import pytest

import fa4_prefixlm as fp
from tests.batch.bad_calls import cu, qkv


def test_a_plan_runs_only_what_it_was_made_for() -> None:
    q, k, v = qkv()
    plan = fp.plan([[(0, 3)], []], like=(q, k, v), cu_seqlens_q=cu(0, 4, 10), cu_seqlens_k=cu(0, 4, 10))
    fp.attention(q, k, v, plan)
    for tensors, argument in (
        ((q[:9], k, v), "q: expected tokens = (10,), as the plan was made for, got (9,)"),
        ((q, k[:9], v[:9]), "k: expected tokens = (10,)"),
        ((q[:, :2], k, v), "q: expected heads = 4"),
        ((q.half(), k.half(), v.half()), "q: expected dtype = torch.float32"),
        ((q, k, v[..., :8]), "v: expected head_dim_v = 16"),
    ):
        with pytest.raises(fp.InputError, match=re.escape(argument)):
            fp.attention(*tensors, plan)
    for name, value in (("cu_seqlens_q", cu(0, 10)), ("mask", fp.PrefixLM()), ("backend", "auto"), ("max_range", 3)):
        with pytest.raises(fp.InputError, match=f"{name}: expected None beside a plan"):
            fp.attention(q, k, v, plan, **{name: value})
    with pytest.raises(fp.InputError, match="like: expected the tensors"):
        fp.plan(None, like=q)


def test_a_plan_has_its_own_lengths() -> None:
    q, k, v = qkv()
    mine = cu(0, 4, 10)
    plan = fp.plan(None, like=(q, k, v), cu_seqlens_q=mine, cu_seqlens_k=mine)
    mine[1] = 9
    assert plan.lengths.cu_seqlens_q.tolist() == [0, 4, 10]
