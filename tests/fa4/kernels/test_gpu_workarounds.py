"""Workarounds on the GPU: needed, and enough."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

WORKAROUND_SCRIPT = """
import contextlib, sys, torch
import fa4_prefixlm as fp
from fa4_prefixlm.testing.accuracy import exact_attention, relative_error
from fa4_prefixlm.fa4.kernels import workarounds
dim, tokens = 256, 1500
q, k, v = (torch.randn(tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for heads in (2, 1, 1))
spans = (((100, 356), (700, 956)),)
with workarounds.disabled() if sys.argv[1] == "off" else contextlib.nullcontext():
    out = fp.attention(q, k, v, spans, cu_seqlens_q=[0, tokens], cu_seqlens_k=[0, tokens], backend="varlen")
exact, _ = exact_attention(q, k, v, mask=fp.PrefixLM(), spans=spans, seqlens=((tokens,), (tokens,)))
print(relative_error(out, exact))
"""


def test_without_the_list_stride_workaround_head_dim_256_is_wrong() -> None:
    from fa4_prefixlm.fa4.builds.locate import installed

    if installed().sm90_list_stride != "128":
        pytest.skip("the installed build does not have the defect")
    errors = {}
    environment = {name: value for name, value in os.environ.items() if "DSL_CACHE" not in name}
    for workaround in ("on", "off"):
        command = [sys.executable, "-c", WORKAROUND_SCRIPT, workaround]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        errors[workaround] = float(done.stdout.split()[-1])
    assert errors["on"] < 3e-3
    assert not errors["off"] < 0.1, "the defect does not show: is the workaround still needed?"
