"""Values on the device are checked there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fa4_prefixlm as fp

pytestmark = pytest.mark.gpu


def test_debug_mode_reads_device_values_back() -> None:
    q, k, v = (torch.randn(100, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    cu = torch.tensor([0, 100], dtype=torch.int32, device="cuda")
    bad = torch.tensor([[[50, 40]]], dtype=torch.int32, device="cuda")
    with fp.debug(), pytest.raises(fp.InputError, match="start below end"):
        fp.attention(q, k, v, bad, cu_seqlens_q=cu, cu_seqlens_k=cu)
    with fp.debug(), pytest.raises(fp.InputError, match="the tensor's length 100"):
        fp.attention(q, k, v, cu_seqlens_q=cu // 2, cu_seqlens_k=cu)


DEVICE_SCRIPT = """
import sys, torch, fa4_prefixlm as fp
q = torch.randn(100, 2, 64, device="cuda", dtype=torch.bfloat16)
cu = torch.tensor([0, 100], dtype=torch.int32, device="cuda")
ranges = torch.tensor([eval(sys.argv[1])], dtype=torch.int32, device="cuda")
fp.attention(q, q, q, ranges, cu_seqlens_q=cu, cu_seqlens_k=cu, max_range=60)
torch.cuda.synchronize()
print("fine")
"""


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ("[(50, 40)]", "reversed"),
        ("[(0, 20), (10, 30)]", "overlap"),
        ("[(90, 101)]", "cut by the end of its keys"),
        ("[(0, 61)]", "longer than max_range"),
        ("[(50, 60), (0, 50), (0, 0)]", None),
    ],
)
def test_device_values_are_asserted_on_the_device(spans: str, message: str | None) -> None:
    done = subprocess.run([sys.executable, "-c", DEVICE_SCRIPT, spans], capture_output=True, text=True, check=False)
    if message is None:
        assert done.stdout.strip() == "fine", done.stderr
    else:
        assert done.returncode != 0
        assert message in done.stderr
