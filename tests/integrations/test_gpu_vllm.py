"""vLLM's layers on the GPU: each FA4 there is, against fp64 and against the call that vLLM makes."""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.fa4.builds import describe as builds
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.integrations.vllm import (
    split_cache,
)
from fa4_prefixlm.testing.accuracy import relative_error
from fa4_prefixlm.testing.bands import row_errors
from tests.exactness import allowed, assert_exact, assert_within, errors
from tests.integrations.vllm_steps import Model, Request, Shape, Step, run_layer, starts_of

GEMMA3 = {"local": Model(1024, 1024), "global": Model(None, 1024)}
GEMMA4 = {"local": Model(1024, 1024, clamp=True)}
GPU = Shape((8, 4), 256, 16, 256, 12000, 16, torch.bfloat16, "cuda")
KINDS = {
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
    "images longer than the window": {"local": Model(200, 200, clamp=True)},
}

BAND = 1.25


def need(build: str) -> builds.Build:
    found = locate.installed(build)
    if found is None:
        pytest.skip(f"{build} is not installed")
    return found


def gpu_step(rng: random.Random, shape: Shape, model_window: int | None) -> Step:
    """Prompts with images of 256 tokens, chunks after a cache, decoding, each a few."""
    requests = []
    for _ in range(rng.randint(1, 3)):
        begins = range(rng.randint(0, 99), rng.randint(900, 3000), rng.choice([256, 300, 700]))
        ranges = tuple((begin, begin + 255) for begin in begins)
        prompt = ranges[-1][1] + 1 + rng.randint(0, 300)
        context = rng.choice([0, rng.randint(0, 300), ranges[-1][0] + 100])
        requests.append(Request(context, fp.safe_chunk_end(prompt, []) - context, ranges))
    requests += [Request(rng.randint(500, 3000), 1, ((4, 259),)) for _ in range(rng.randint(0, 4))]
    return Step.of(requests, shape, model_window, rng)


@functools.cache
def vllm_mask_mod(layer_window: int | None, clamp: bool, build: str):
    """`sees`, for a kernel: `aux_tensors[0]` is each query row's own range, inclusive, (-1, -1) for none."""
    import cutlass
    from cutlass import cute

    utils = need(build).part("utils")

    @cute.jit
    def vllm_rule(batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
        ranges = aux_tensors[0]
        q, kv = utils.ssa_to_scalar(q_idx), utils.ssa_to_scalar(kv_idx)
        row = q + seqlen_info.offset_q
        p = q + seqlen_info.seqlen_k - seqlen_info.seqlen_q
        before = kv <= p
        inside = (kv >= ranges[row, 0]) & (kv <= ranges[row, 1])
        if cutlass.const_expr(layer_window is not None):
            near = p - kv < layer_window
            before = before & near
            if cutlass.const_expr(clamp):
                inside = inside & near
        return utils.scalar_to_ssa(before | inside, cutlass.Boolean)

    return vllm_rule


def vllm_call(step: Step, model: Model, build: str) -> torch.Tensor:
    """The call that vLLM makes where a batch has images: a mask_mod, every key tile."""
    ranges = torch.full((step.total + 256, 2), -1, dtype=torch.int32)
    starts = starts_of(step.requests)
    for first, request in zip(starts, step.requests, strict=False):
        for start, end in request.kept(model):
            begin, stop = max(start - request.context, 0), min(end + 1 - request.context, request.rows)
            if start < end and begin < stop:
                ranges[first + begin : first + stop] = torch.tensor([start, end], dtype=torch.int32)
    keys, values = split_cache(step.cache)
    q = step.q.narrow(0, 0, step.total)
    out, *_ = (
        need(build)
        .part("interface")
        ._flash_attn_fwd(
            q,
            keys,
            values,
            cu_seqlens_q=step.metadata["query_start_loc"],
            seqused_k=step.metadata["seq_lens"],
            page_table=step.metadata["block_table"],
            max_seqlen_q=max(request.rows for request in step.requests),
            max_seqlen_k=max(request.keys for request in step.requests),
            softmax_scale=q.shape[2] ** -0.5,
            causal=False,
            mask_mod=vllm_mask_mod(model.window, model.clamp, build),
            aux_tensors=[ranges.to(q.device)],
        )
    )
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", locate.MODULES)
def test_on_a_gpu_it_is_exact_and_vllms_call(build: str, kind: str, gpu_report) -> None:
    need(build)
    rng, models = random.Random(kind), KINDS[kind]
    plans = GPU.plans({name: model.mask() for name, model in models.items()}, build)
    for seed in range(4):
        window_of_group = min(model.window or 10**9 for model in models.values())
        step = gpu_step(rng, GPU, window_of_group if len(models) == 1 else None)
        plans.update(**step.metadata, mm_ranges=step.mm_ranges(next(iter(models.values()))))
        for name, model in models.items():
            exact = step.exact(model)
            direct, found = (
                errors(out, exact) for out in (vllm_call(step, model, build), run_layer(plans, name, step))
            )
            gpu_report(
                backend=f"vLLM layers on {build}",
                kind=f"{kind}, {name}",
                mask=str(model.mask()),
                seed=seed,
                error=found.error,
                band=direct.error,
                row_error=found.row_error,
                row_band=direct.row_error,
            )
            assert_within(direct, allowed(GPU.dtype, error=3e-3), f"{name}: the peer itself is off")
            limit = allowed(GPU.dtype, direct, error=BAND * direct.error + 1e-6)
            assert_within(found, limit, f"{name}, seed {seed}, against vLLM's call")


@pytest.mark.gpu
def test_on_a_gpu_both_builds_agree() -> None:
    for build in locate.MODULES:
        need(build)
    model = GEMMA3["local"]
    step = gpu_step(random.Random(5), GPU, model.window)
    outs = []
    for build in locate.MODULES:
        plans = GPU.plans({"local": model.mask()}, build)
        plans.update(**step.metadata, mm_ranges=step.mm_ranges(model))
        outs.append(run_layer(plans, "local", step))
    assert relative_error(outs[0], outs[1]) < 1e-3
    assert row_errors(outs[0], outs[1].double()).max() < 8e-3


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("prefix_lm", "backend"), [(False, "causal"), (True, "two_pass")])
@pytest.mark.parametrize("build", locate.MODULES)
def test_on_a_gpu_layers_of_head_dim_512(
    build: str, prefix_lm: bool, backend: str, block_size: int, heads: tuple[int, int]
) -> None:
    if need(build).head_dims.refusal(90, 512, 512) is not None:
        pytest.skip(f"{build} has no head dim 512")
    model, rng = Model(None, 1024, clamp=True, prefix_lm=prefix_lm), random.Random(block_size)
    shape = dataclasses.replace(GPU, head_dim=512, heads=heads, block_size=block_size)
    plans = shape.plans({"global": model.mask()}, build)
    for _ in range(3):
        step = gpu_step(rng, shape, None)
        plans.update(**step.metadata, mm_ranges=step.mm_ranges(model))
        out = run_layer(plans, "global", step)
        assert [own.choice.name for own in plans.plans.values()] == [backend]
        assert_exact(out, step.exact(model), error=3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("build", locate.MODULES)
def test_on_a_gpu_nothing_synchronises(build: str) -> None:
    need(build)
    plans = GPU.plans({name: model.mask() for name, model in GEMMA3.items()}, build)
    assert plans.in_place
    steps = [gpu_step(random.Random(seed), GPU, None) for seed in range(3)]
    plans.warm_up(steps[0].cache)
    outs = [torch.empty_like(step.q) for step in steps]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, out in zip(steps, outs, strict=True):
            plans.update(**step.metadata, mm_ranges=step.mm_ranges(GEMMA3["local"]))
            plans.attention("local", step.q, step.cache, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, out in zip(steps, outs, strict=True):
        assert_exact(out[: step.total], step.exact(GEMMA3["local"]), error=3e-3)


def padded(step: Step, requests: int) -> dict[str, torch.Tensor]:
    """The metadata with as many requests, as vLLM pads a step for a graph that it replays."""
    more = requests - len(step.metadata["seq_lens"])
    own = {name: torch.nn.functional.pad(step.metadata[name], (0, more)) for name in ("seq_lens", "seq_lens_cpu")}
    own["block_table"] = torch.nn.functional.pad(step.metadata["block_table"], (0, 0, 0, more))
    for name in ("query_start_loc", "query_start_loc_cpu"):
        starts = step.metadata[name]
        own[name] = torch.cat([starts, starts[-1:].expand(more)])
    return own


@pytest.mark.gpu
@pytest.mark.parametrize("build", locate.MODULES)
def test_on_a_gpu_a_captured_step_runs_the_last_update(build: str) -> None:
    """Captured on a step of text, replayed on ones with images."""
    need(build)
    model = GEMMA3["local"]
    plans = GPU.plans({"local": model.mask()}, build)
    steps = [gpu_step(random.Random(seed), GPU, None) for seed in range(4)]
    rows, blocks = max(len(step.q) for step in steps), max(len(step.cache) for step in steps)
    q, out = (torch.zeros(rows, 8, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    cache = torch.zeros(blocks, 16, 4, 512, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    plans.warm_up(cache)
    requests = max(len(step.metadata["seq_lens"]) for step in steps)
    plans.update(**padded(steps[0], requests))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plans.attention("local", q, cache, out)
    for index, step in enumerate(steps):
        ranges = {} if index == 0 else step.mm_ranges(model)
        plans.update(**padded(step, requests), mm_ranges=ranges)
        q[: len(step.q)] = step.q
        cache[: len(step.cache)] = step.cache
        graph.replay()
        wanted = Model(1024, 1024, prefix_lm=False) if index == 0 else model
        assert_exact(out[: step.total], step.exact(wanted), error=3e-3)
