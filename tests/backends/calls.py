"""A call on a Hopper GPU, what its mask asks for, and builds that take it."""

from __future__ import annotations

import dataclasses

import torch

from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds import describe as builds
from fa4_prefixlm.geometry.traits import CausalWindow, Traits
from fa4_prefixlm.masks.protocols import Reach

GPU_CALL = CallSpec(
    batched=False,
    shape_q=(1000,),
    shape_k=(1000,),
    heads_q=4,
    heads_kv=2,
    head_dim=128,
    head_dim_v=128,
    dtype=torch.bfloat16,
    device=torch.device("cuda", 0),
    needs_grad=False,
    arch=90,
)

DEMAND = Traits(intervals=1, tagged=False, banded=True, reach=Reach(1023, 256), causal_part=CausalWindow(1024))
GOOD = dataclasses.replace(builds.BEST, name="flash-attn-4 9.9")
NO_NATIVE = dataclasses.replace(GOOD, native_refusal="its internals are not known")
