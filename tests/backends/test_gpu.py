"""Every FA4 backend on the GPU against fp64, inside FA4's causal error band; poison, determinism, no synchronisation.

With `--gpu-report FILE` (see conftest) the measured errors are kept as JSON.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.masks import causal, prefix, window
from fa4_prefixlm.testing.batches import UGLY, Batch, masks_for, random_batch, random_mask
from fa4_prefixlm.testing.empty_rows import Blind, ChainedBlind
from tests.backends.gpu_calls import (
    BACKENDS,
    EVERY,
    MASK_MODS,
    ONE_CALL,
    Kind,
    causal_band,
    limit,
    measured,
    run,
    tensors_of,
)
from tests.exactness import allowed, assert_within

pytestmark = pytest.mark.gpu

DIMS = ((64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256), (64, 128), (128, 64))
KINDS = [Kind(dims) for dims in DIMS]

KINDS += [
    Kind((128, 128), torch.float16, (4, 4)),
    Kind((256, 256), torch.float16, (6, 1)),
    Kind((64, 64), torch.bfloat16, (5, 5), softcap=20.0),
    Kind((128, 128), torch.bfloat16, (6, 2), softcap=30.0, sink=True),
    Kind((256, 256), torch.bfloat16, (8, 4), softcap=50.0),
    Kind((128, 128), torch.bfloat16, (8, 1), sink=True),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_batches_are_within_the_causal_band(kind: Kind, gpu_report) -> None:
    for seed in range(10):
        rng = random.Random(f"{kind}{seed}")
        batch, mask = random_batch(rng, longest=900), random_mask(rng)
        q, k, v, options = tensors_of(kind, batch, seed)
        band = causal_band(q, k, v, batch, mask.window, options)
        for backend in EVERY:
            found = run(kind, batch, mask, backend, seed, device_inputs=rng.random() < 0.5)
            gpu_report(
                kind=str(kind),
                seed=seed,
                backend=backend,
                mask=str(mask),
                **measured(found, band),
            )
            assert_within(found, limit(backend, kind, band), f"seed {seed}, {backend}, {mask}, {batch}")


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("name", UGLY)
def test_ugly_batches(name: str, dims: tuple[int, int], gpu_report) -> None:
    batch, kind = UGLY[name], Kind(dims)
    q, k, v, options = tensors_of(kind, batch, 3)
    for mask in masks_for(batch):
        band = causal_band(q, k, v, batch, mask.window, options)
        for backend in EVERY:
            found = run(kind, batch, mask, backend, 3)
            gpu_report(
                kind=str(kind),
                batch=name,
                backend=backend,
                mask=str(mask),
                **measured(found, band),
            )
            # A batch of a few rows has no error band to speak of: bf16 rounds to 2**-9.
            assert_within(found, limit(backend, kind, band, at_least=2.5e-3), f"{backend}, {mask}")


@pytest.mark.parametrize("backend", [*ONE_CALL, "flex"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_rows_that_see_nothing_are_zero_with_lse_minus_infinity(backend: str, dims: tuple[int, int]) -> None:
    batch = Batch(((900, 900), (150, 150), (300, 300)), (((100, 500),), (), ((200, 300),)))
    for mask in (Blind(), Blind(window=100), ChainedBlind(window=100)):
        found = run(Kind(dims), batch, mask, backend, seed=1)  # also compares the -inf of the LSE
        assert_within(found, allowed(torch.bfloat16, error=2.5e-3), f"{mask}")
        q, k, v = batch.tensors((4, 2), dims, torch.bfloat16, "cuda", 1)
        out = fp.attention(
            q, k, v, batch.spans, cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, mask=mask, backend=backend
        )
        assert (out[:200] == 0).all()
        assert (out[900:1050] == 0).all()


@pytest.mark.parametrize("backend", MASK_MODS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_memory_after_the_bounds_does_not_matter(backend: str, dim: int) -> None:
    batch = random_batch(random.Random(5), longest=700)
    q, k, v = batch.tensors((4, 2), (dim, dim), torch.bfloat16, "cuda", 0)
    plan = fp.plan(batch.spans, like=(q, k, v), cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, backend=backend)
    clean = fp.attention(q, k, v, plan)
    code = plan.prepared.code
    bounds = code.aux_tensors[0]
    for poison in ((0, 2**31 - 1), (-(2**31), -(2**31)), (2**31 - 1, 2**31 - 1)):
        around = torch.tensor(poison, dtype=torch.int32, device="cuda").repeat(len(bounds) + 2048, 1, 1)
        around[: len(q)] = bounds[: len(q)]  # the padding rows are poison too
        plan.prepared.code = dataclasses.replace(code, aux_tensors=[around[: len(bounds)]])
        assert torch.equal(fp.attention(q, k, v, plan), clean)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_memory_around_the_native_bounds_does_not_matter(dim: int) -> None:
    batch = random_batch(random.Random(5), longest=700)
    q, k, v = batch.tensors((4, 2), (dim, dim), torch.bfloat16, "cuda", 0)
    plan = fp.plan(batch.spans, like=(q, k, v), cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, backend="native")
    clean = fp.attention(q, k, v, plan)
    call = plan.prepared
    used = torch.zeros(len(call.tiles), dtype=torch.bool)
    for index, (rows, _) in enumerate(batch.seqlens):
        first = batch.cu_q[index] // call.kernel.tokens + index
        used[first : first + -(-rows // call.kernel.tokens)] = True
    for poison in (2**31 - 1, -(2**31), 7):
        bounds = torch.full((len(call.bounds) + 2048, 2), poison, dtype=torch.int32, device="cuda")
        bounds[: len(q)] = call.bounds[: len(q)]
        tiles = torch.where(used[:, None].cuda(), call.tiles, poison)
        plan.prepared = dataclasses.replace(call, bounds=bounds, tiles=tiles)
        assert torch.equal(fp.attention(q, k, v, plan), clean)


@pytest.mark.parametrize("backend", [*BACKENDS, "flex"])
def test_plan_and_attention_do_not_synchronise(backend: str) -> None:
    batch = Batch(((300, 300), (100, 260)), (((4, 260),), ((0, 100), (200, 256))))
    q, k, v = batch.tensors((4, 2), (128, 128), torch.bfloat16, "cuda", 0)
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32, device="cuda") for cu in (batch.cu_q, batch.cu_k))
    ranges = batch.ranges_tensor().cuda()

    def call(given, cu_q, cu_k):
        plan = fp.plan(
            given, like=(q, k, v), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, mask=fp.PrefixLM(100), backend=backend
        )
        return fp.attention(q, k, v, plan)

    warm = call(ranges, cu_q, cu_k)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outs = [call(ranges, cu_q, cu_k), call([list(own) for own in batch.spans], batch.cu_q, batch.cu_k)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(torch.equal(out, warm) for out in outs)


def test_batched_tensors_are_the_packed_ones() -> None:
    q, k, v = (torch.randn(3, 200, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    ranges = [[(0, 50)], [], [(100, 200)]]
    out, lse = fp.attention(q, k, v, ranges, return_lse=True)
    cu = [0, 200, 400, 600]
    flat, flat_lse = fp.attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ranges, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True
    )
    assert torch.equal(out.flatten(0, 1), flat)
    assert torch.equal(lse.transpose(0, 1).flatten(1), flat_lse)
    strided = torch.randn(3, 4, 200, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    again = fp.attention(strided, k, v, ranges)
    assert torch.equal(again, fp.attention(strided.contiguous(), k, v, ranges))


def test_auto_takes_native_and_packed_when_lists_would_be_large() -> None:
    q, k, v = (torch.empty(2**19, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (2, 1, 1))
    cu = [0, 2**19]
    where = {"like": (q, k, v), "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    plan = fp.plan([[(0, 256)]], mask=fp.PrefixLM(1024), **where)
    assert (plan.choice.name, [name for name, _ in plan.choice.passed_over]) == ("native", ["causal"])
    two = fp.plan({"prompt": [[(0, 256)]]}, mask=causal & (prefix("prompt") | window(1024)), **where)
    assert two.choice.name in ("varlen", "packed")
    if two.choice.name == "packed":
        assert "MiB" in dict(two.choice.passed_over)["varlen"]


@pytest.mark.parametrize("window", [None, 100])
def test_a_text_only_batch_is_fa4s_own_call_bit_for_bit(window: int | None) -> None:
    from fa4_prefixlm.batch.keys import Keys
    from fa4_prefixlm.fa4.builds.locate import installed
    from fa4_prefixlm.fa4.kernels.launch import causal_forward

    batch = Batch(((300, 300), (1, 500), (200, 600)), ((), ((3, 60),), ((0, 400),)))
    q, k, v = batch.tensors((4, 2), (128, 128), torch.bfloat16, "cuda", 0)
    where = {"cu_seqlens_q": batch.cu_q, "cu_seqlens_k": batch.cu_k}
    plan = fp.plan(batch.spans, like=(q, k, v), mask=fp.PrefixLM(window), **where)
    assert plan.choice.name == "causal"
    out, lse = fp.attention(q, k, v, plan, return_lse=True)
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32, device="cuda") for cu in (batch.cu_q, batch.cu_k))
    keys = Keys(600, cu_seqlens_k=cu_k)
    own, own_lse = causal_forward(
        q,
        k,
        v,
        build=installed(),
        cu_seqlens_q=cu_q,
        max_seqlen_q=300,
        keys=keys,
        options=Options(128**-0.5),
        window=window,
    )
    assert torch.equal(out, own)
    assert torch.equal(lse, own_lse)
    touched = fp.plan([[], [(3, 60)], [(0, 401)]], like=(q, k, v), mask=fp.PrefixLM(window), **where)
    assert touched.choice.name == "native"


def test_a_gradient_needs_no_other_forward() -> None:
    q, k, v = (torch.randn(100, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = fp.attention(q, k, v, [[(3, 50)]], cu_seqlens_q=[0, 100], cu_seqlens_k=[0, 100])
    out.float().sum().backward()
    assert q.grad is not None
    with torch.no_grad():
        plan = fp.plan([[(3, 50)]], like=(q, k, v), cu_seqlens_q=[0, 100], cu_seqlens_k=[0, 100])
    assert (plan.choice.name, plan.choice.backward.name) == ("native", "native")
    sink = torch.zeros(2, device="cuda", requires_grad=True)
    fp.attention(q.detach(), k.detach(), v.detach(), plan, learnable_sink=sink).float().sum().backward()
    assert sink.grad is not None
