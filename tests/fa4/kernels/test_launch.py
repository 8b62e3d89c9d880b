"""What a launch does on builds that take less than the newest."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch

from fa4_prefixlm.backends.reference import dense_attention
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.builds.describe import CAUSAL_ARGUMENTS
from fa4_prefixlm.fa4.kernels import launch
from fa4_prefixlm.masks import PrefixLM
from tests.backends.calls import NO_NATIVE

OLD = dataclasses.replace(NO_NATIVE, name="flash-attn-4 4.0.0b12", varlen_mask=False, varlen_lists=False)


@pytest.mark.parametrize("sink_dtype", [torch.float32, torch.bfloat16])
def test_a_sink_that_a_build_does_not_take_joins_its_output(
    monkeypatch: pytest.MonkeyPatch, sink_dtype: torch.dtype
) -> None:
    """The build is played in torch: it takes sinks in bfloat16, and no pages."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, heads, 16, generator=generator) for heads in (4, 2, 2))
    sink = torch.randn(4, generator=generator).to(sink_dtype)
    seqlens, seen = ((40,), (40,)), []

    def attend(q, k, v, own_sink):
        options = Options(0.25, 0.0, own_sink)
        return dense_attention(q, k, v, mask=PrefixLM(), spans={"image": ((),)}, seqlens=seqlens, options=options)

    def forward(q, k, v, *, learnable_sink, **named):
        seen.append((learnable_sink, set(named)))
        return attend(q, k, v, learnable_sink)

    monkeypatch.setitem(sys.modules, "played_fa4", types.ModuleType("played_fa4"))
    interface = types.ModuleType("played_fa4.interface")
    interface._flash_attn_fwd = forward
    monkeypatch.setitem(sys.modules, "played_fa4.interface", interface)
    build = dataclasses.replace(OLD, module="played_fa4", sink_dtypes=(torch.bfloat16,))
    cu = torch.tensor([0, 40], dtype=torch.int32)
    out, lse = launch.causal_forward(
        q,
        k,
        v,
        build=build,
        cu_seqlens_q=cu,
        max_seqlen_q=40,
        keys=launch.Keys(40, cu_seqlens_k=cu),
        options=Options(0.25, learnable_sink=sink),
    )
    expected, expected_lse = attend(q, k, v, sink)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(lse, expected_lse, atol=1e-6)
    ((given, named),) = seen
    assert (given is sink) is (sink_dtype == torch.bfloat16)
    assert named <= CAUSAL_ARGUMENTS
