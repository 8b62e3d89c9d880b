"""What FA4's own backward is handed, each tensor where FA4 names it; no kernel runs."""

from __future__ import annotations

import inspect

import pytest
import torch

from fa4_prefixlm.batch.forward_pass import ForwardPass
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.builds.describe import BEST
from fa4_prefixlm.fa4.kernels.backward_launch import causal_backward
from fa4_prefixlm.testing.batches import Batch
from fa4_prefixlm.testing.stages import sizes_of

interface = pytest.importorskip("flash_attn.cute.interface", reason="flash-attn-4 is not installed")


def test_the_causal_call_hands_over_each_tensor_by_its_name(monkeypatch):
    signature, calls = inspect.signature(interface._flash_attn_bwd), []

    def record(*tensors, **options):
        calls.append(signature.bind(*tensors, **options).arguments)
        return "dq", "dk", "dv"

    monkeypatch.setattr(interface, "_flash_attn_bwd", record)
    forward = ForwardPass(*(torch.full((1, 1, 1), float(value)) for value in range(5)))
    lengths = sizes_of(Batch(((3, 3),), ((),)))
    dout, dlse = torch.tensor(5.0), torch.tensor(6.0)
    grads = causal_backward(forward, dout, dlse, build=BEST, lengths=lengths, window=None, options=Options(0.5))
    assert grads == ("dq", "dk", "dv")
    (call,) = calls
    own = {**forward._asdict(), "dout": dout, "dlse": dlse, "cu_seqlens_q": lengths.cu_seqlens_q}
    for name, tensor in own.items():
        assert call[name] is tensor, name
    assert call["causal"]
    assert call["softmax_scale"] == 0.5
