"""`attention` inside torch.compile: one graph, the eager bits, no recompilation for the next plan, the same errors."""

from __future__ import annotations

import copy
import gc
import re
import shutil
import threading
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fa4_prefixlm as fp
from fa4_prefixlm.runtime import torch_ops as op
from fa4_prefixlm.testing.accuracy import relative_error
from fa4_prefixlm.testing.batches import Batch

BACKENDS: list[Any] = ["eager", "aot_eager"]
if any(map(shutil.which, ("c++", "g++", "clang++"))):
    BACKENDS.append(pytest.param("inductor", marks=pytest.mark.slow))
# Of 60 tokens each: other lengths, other numbers of sequences, other spans, none at all.
BATCHES = [
    Batch(((20, 20), (40, 40)), (((3, 11),), ((0, 9), (20, 33)))),
    Batch(((60, 60),), (((1, 59),),)),
    Batch(((10, 10), (0, 0), (30, 30), (20, 20)), ((), (), (), ())),
]
OPS = torch.ops.fa4_prefixlm


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def tensors(total: int = 60, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(total, heads, 16, generator=generator).to(dtype) for heads in (4, 2, 2))


def planned(batch: Batch, like, mask: fp.Mask = fp.PrefixLM()) -> fp.Plan:  # noqa: B008 (an immutable value)
    spans = [list(own) for own in batch.spans]
    return fp.plan(spans, like=like, cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, mask=mask)


def compiled(function, backend: str = "aot_eager"):
    """(the function in one graph, the counter of its compilations)."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def assert_same(got, wanted) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


def layer(q, k, v, plan, **options):
    """Attention between other work; doubling is exact, so a fused graph has the eager bits."""
    out, lse = fp.attention(q * 2, k, v, plan, return_lse=True, **options)
    return out * 2, lse


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_plans_run_in_the_graph_of_the_first(backend: str) -> None:
    own = tensors(dtype=torch.bfloat16)
    run, counter = compiled(layer, backend)
    for batch in BATCHES:
        for mask in (fp.PrefixLM(), fp.PrefixLM(7), fp.PrefixLM(7, clamp=False)):
            plan = planned(batch, own, mask)
            assert_same(run(*own, plan), layer(*own, plan))
    assert counter.frame_count == 1


def test_lengths_become_dynamic_at_their_first_change() -> None:
    run, counter = compiled(layer)
    for total in (60, 50, 33, 71):
        own = tensors(total)
        plan = planned(Batch(((total, total),), (((2, total - 1),),)), own)
        assert_same(run(*own, plan), layer(*own, plan))
    assert counter.frame_count == 2


def test_two_masks_in_one_graph() -> None:
    q, k, v = tensors()
    local, full = (planned(BATCHES[0], (q, k, v), mask) for mask in (fp.PrefixLM(5), fp.PrefixLM()))

    def layers(first, second):
        return (fp.attention(fp.attention(q, k, v, first), k, v, second),)

    run, counter = compiled(layers)
    for pair in ((local, full), (full, local), (planned(BATCHES[1], (q, k, v)), local)):
        assert_same(run(*pair), layers(*pair))
    assert counter.frame_count == 1


def test_a_plan_kept_in_the_model() -> None:
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return (fp.attention(q, k, v, self.plan),)

    own, model = tensors(), Model()
    run, counter = compiled(model)
    for batch in BATCHES:
        model.plan = planned(batch, own)
        assert_same(run(*own), (fp.attention(*own, model.plan),))
    assert counter.frame_count == 1


def test_a_plan_made_in_inference_mode() -> None:
    own = tensors()
    with torch.inference_mode():
        inside = planned(BATCHES[1], own)
    run, counter = compiled(layer)
    for plan in (planned(BATCHES[0], own), inside):
        assert_same(run(*own, plan), layer(*own, plan))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_tensors_and_options(backend: str) -> None:
    q, k, v = (tensor.reshape(3, 20, *tensor.shape[1:]) for tensor in tensors(dtype=torch.bfloat16))
    plan = fp.plan([[(1, 9)], [], [(4, 20)]], like=(q[:, 8:], k, v))
    options = {"softcap": 5.0, "softmax_scale": 0.3, "learnable_sink": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    run, _ = compiled(layer, backend)
    for own in (options, {**options, "learnable_sink": None}):
        assert_same(run(q[:, 8:], k, v, plan, **own), layer(q[:, 8:], k, v, plan, **own))


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written(backend: str) -> None:
    q, k, v = tensors()

    def layers(buffer, plan):
        same, lse = fp.attention(q, k, v, plan, out=buffer[0], return_lse=True)
        fp.attention(q * 2, k, v, plan, out=buffer[1])  # whose result nobody reads
        return same * 2, lse

    run, counter = compiled(layers, backend)
    for batch in BATCHES:
        plan = planned(batch, (q, k, v))
        ours, theirs = torch.full((2, *q.shape), float("nan")), torch.empty(2, *q.shape)
        assert_same((*run(ours, plan), ours), (*layers(theirs, plan), theirs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_serving_plan_updated_between_calls(backend: str) -> None:
    q, k, v = tensors()
    caches = [batch.in_pages(k, v, 4, seed) for seed, batch in enumerate(BATCHES)]
    room = max(len(pages.k) for pages in caches)
    caches = [[torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 0, 0, room - len(t))) for t in (c.k, c.v)] for c in caches]
    tables = [batch.in_pages(k, v, 4, seed).table for seed, batch in enumerate(BATCHES)]
    serving = fp.serving_plan(like=(q, *caches[0]), max_tokens=60, max_sequences=4, max_pages=20)
    run, counter = compiled(layer, backend)
    for batch, cache, table in zip(BATCHES, caches, tables, strict=True):
        spans = [list(own) for own in batch.spans]
        serving.update(spans, cu_seqlens_q=batch.cu_q, seqused_k=list(batch.as_seqlens[1]), page_table=table)
        got = run(q, *cache, serving)
        assert_same(got, layer(q, *cache, serving))
        assert_same(got, layer(q, k, v, planned(batch, (q, k, v))))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("error:.*autograd kernel")
def test_gradients(backend: str) -> None:
    """One graph forward and one backward for every batch; `out=` and no gradient beside it."""
    own = tensors(dtype=torch.float64)
    project = torch.nn.Linear(16, 16, dtype=torch.float64)
    sink = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()

    def model(q, k, v, plan, **options):
        return layer(project(q), k, v, plan, learnable_sink=sink, **options)

    run, counter = compiled(model, backend)
    for batch in BATCHES:
        plan = planned(batch, own)
        found = []
        for call in (model, run):
            leaves = [tensor.clone().requires_grad_() for tensor in own]
            out, lse = call(*leaves, plan)
            loss = (out * own[0]).sum() + lse.sin().sum()
            found.append(torch.autograd.grad(loss, [*leaves, sink, *project.parameters()]))
        for ours, theirs in zip(*reversed(found), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # the LSE is float32
    assert counter.frame_count == 1
    with pytest.raises(fp.InputError, match="^out: expected None where a gradient is needed"):
        run(*own, planned(BATCHES[0], own), out=torch.empty_like(own[0]))


def test_transforms_are_refused() -> None:
    """Torch's own message would be a warning that the gradient may be wrong, and zeros."""
    q, k, v = tensors()
    plan = planned(BATCHES[0], (q, k, v))
    run, _ = compiled(torch.func.grad(lambda q: fp.attention(q, k, v, plan).sum()))
    with pytest.raises(RuntimeError, match=r"no torch\.func transform .* in torch\.compile"):
        run(q)


def calls_that_fail():
    """(name, the call, the message) of mistakes; the eager call says the same, but where the message is None for it."""
    q, k, v = tensors()
    plan = planned(BATCHES[0], (q, k, v))
    out = torch.empty(60, 4, 16)

    def call(*own, **options):
        return lambda: fp.attention(*(own or (q, k, v)), plan, **options) * 2

    return {
        "another length": (call(q[:59], k, v), "q: expected tokens = (60,), as the plan was made for, got (59,)"),
        "another dtype": (call(q, k.half(), v), "k: expected q's dtype torch.float32, got torch.float16"),
        "heads": (call(q[:, :3], k, v), "q: expected a multiple of the 2 key heads, got 3 heads"),
        "head_dim": (call(q[..., :8], k[..., :8], v), "q: expected head_dim = 16, as the plan was made for, got 8"),
        "dimensions": (call(q[None], k[None], v[None]), "q: expected tokens = (60,), as the plan was made for"),
        "layout": (call(q.mT, k.mT, v.mT), "q: expected "),
        "softcap": (call(softcap=-1.0), "softcap: expected a non-negative finite number, 0.0 for none, got -1.0"),
        "softmax_scale": (call(softmax_scale=0.0), "softmax_scale: expected a positive finite number, got 0.0"),
        "sink": (call(learnable_sink=torch.zeros(3)), "learnable_sink: expected shape (4,), one per query head"),
        "out": (call(out=out[:, :2]), "out: expected shape (60, 4, 16), got (60, 2, 16)"),
        "out's strides": (call(out=out.mT.contiguous().mT), "out: expected a contiguous tensor"),
        "an argument of the plan": (
            call(max_seqlen_q=60),
            "max_seqlen_q: expected None beside a plan, which has its own",
        ),
        "a mask": (call(mask=fp.PrefixLM(5)), "mask: expected None beside a plan, which has its own"),
    }


@pytest.mark.parametrize("name", calls_that_fail())
def test_mistakes_get_the_eager_error(name: str) -> None:
    call, message = calls_that_fail()[name]
    for function in (call, compiled(call, "eager")[0], compiled(call)[0]):
        with pytest.raises(fp.InputError, match=re.escape(message)):
            function()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranges", [None, [[(3, 9)], []], torch.zeros(2, 1, 2, dtype=torch.int32)])
def test_a_call_without_a_plan_says_to_make_one(backend: str, ranges) -> None:
    q, k, v = tensors()
    cu = torch.tensor([0, 20, 60], dtype=torch.int32)
    run, _ = compiled(lambda q: fp.attention(q, k, v, ranges, cu_seqlens_q=cu, cu_seqlens_k=cu) * 2, backend)
    with pytest.raises(fp.InputError, match=r"^ranges: expected a plan, made with fp\.plan.* outside .*torch\.compile"):
        run(q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_call_stays_in_a_graph_that_only_reads_out(backend: str) -> None:
    q, k, v = tensors()

    def function(out):
        fp.attention(q, k, v, None, cu_seqlens_q=[0, 60], cu_seqlens_k=[0, 60], out=out)
        return out * 2

    with pytest.raises(fp.InputError, match="ranges: expected a plan"):
        compiled(function, backend)[0](torch.empty_like(q))


def test_a_dead_plan_is_an_error() -> None:
    q, k, v = tensors()
    run, _ = compiled(lambda q, handle: OPS.attention(q, k, v, handle, None, 0.0, None)[0] * 2)
    plan = planned(BATCHES[0], (q, k, v))
    handle = plan.handle
    run(q, handle)
    del plan
    gc.collect()
    _others = [planned(batch, (q, k, v)) for batch in BATCHES]  # none of which gets the handle
    with pytest.raises(fp.InputError, match="^ranges: expected a plan that is kept until .* got one that is gone"):
        run(q, handle)


def test_the_registry_keeps_no_plan() -> None:
    own = tensors()
    gc.collect()
    before = len(op._plans)
    run, _ = compiled(layer)
    for batch in BATCHES:
        run(*own, planned(batch, own))
    gc.collect()  # dynamo leaves a cycle behind when it compiles
    assert len(op._plans) == before, "kept by the registry, or by the compiled code"


def test_a_copy_is_a_plan_of_its_own() -> None:
    own = tensors()
    plan = planned(BATCHES[0], own)
    wanted = layer(*own, plan)
    run, counter = compiled(layer)
    for made in (copy.copy(plan), copy.deepcopy(plan)):
        assert int(made.handle) != int(plan.handle)
        assert op._plan(made.handle) is made
        assert_same(run(*own, made), wanted)
    assert counter.frame_count == 1


def test_threads_never_share_a_handle() -> None:
    kept = planned(BATCHES[0], tensors())
    found: list[fp.Plan] = []

    def work() -> None:
        mine = [copy.copy(kept) for _ in range(500)]
        assert all(op._plan(each.handle) is each for each in mine)
        found.extend(mine)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({int(each.handle) for each in found}) == 8 * 500


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
def test_opcheck(batched: bool, with_sink: bool) -> None:
    own = tensors()
    plan = planned(BATCHES[0], own)
    if batched:
        own = tuple(tensor.reshape(2, 30, *tensor.shape[1:]) for tensor in own)
        plan = fp.plan([[(2, 20)], []], like=own)
    sink = torch.randn(4) if with_sink else None
    call = (*own, plan.handle, 0.25, 3.0, sink)
    torch.library.opcheck(OPS.attention.default, call)
    torch.library.opcheck(OPS.attention_out.default, (*call, torch.empty_like(own[0])))


class Toy(torch.nn.Module):
    """Two pre-norm attention layers with grouped queries: one of a window, one of everything."""

    def __init__(self, heads: int = 8, kv_heads: int = 4, head_dim: int = 128) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        width = heads * head_dim
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(width) for _ in range(2))
        self.inputs = torch.nn.ModuleList(
            torch.nn.Linear(width, (heads + 2 * kv_heads) * head_dim, bias=False) for _ in range(2)
        )
        self.outputs = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x, plans):
        for norm, project, merge, plan in zip(self.norms, self.inputs, self.outputs, plans, strict=True):
            heads = project(norm(x)).unflatten(-1, (-1, self.head_dim))
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
            x = x + merge(fp.attention(q, k, v, plan).flatten(-2))
        return x


def test_toy_model_on_the_reference() -> None:
    model = Toy(4, 2, 16)
    x = torch.randn(60, 64)
    like = tuple(torch.empty(60, heads, 16) for heads in (4, 2, 2))
    run, counter = compiled(model)
    for batch in BATCHES:
        plans = [planned(batch, like, mask) for mask in (fp.PrefixLM(7), fp.PrefixLM())]
        with torch.no_grad():
            torch.testing.assert_close(run(x, plans), model(x, plans))
    assert counter.frame_count == 1


GPU_BATCHES = [
    Batch(((300, 300), (724, 724)), (((4, 260),), ((0, 256), (300, 556)))),
    Batch(((1024, 1024),), (((1, 1000),),)),
    Batch(((512, 512), (512, 512)), ((), ())),
]


def gpu_tensors(seed: int = 0, *, batch: Batch = GPU_BATCHES[0]):
    return batch.tensors((8, 4), (128, 128), torch.bfloat16, "cuda", seed)


def gpu_plan(batch: Batch, like, mask: fp.Mask, backend: str = "native") -> fp.Plan:
    spans = [list(own) for own in batch.spans]
    return fp.plan(spans, like=like, cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, mask=mask, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_toy_model_on_the_gpu(mode: str) -> None:
    """Native, in one graph; inductor's CUDA graphs must not keep the first plan."""
    torch.manual_seed(0)
    model = Toy().to("cuda", torch.bfloat16)
    x = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    run = torch.compile(model, fullgraph=True, mode=mode)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch in GPU_BATCHES * 2:
        plans = [gpu_plan(batch, gpu_tensors(), mask) for mask in (fp.PrefixLM(256), fp.PrefixLM())]
        with torch.no_grad():
            wanted, got = model(x, plans), run(x, plans).clone()
        assert relative_error(got, wanted.double()) < 2e-2  # inductor rounds the other layers less often
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "varlen", "packed", "reference"])
def test_attention_alone_has_the_eager_bits_on_the_gpu(backend: str) -> None:
    own = gpu_tensors()
    run, counter = compiled(layer, "inductor")
    for batch in GPU_BATCHES:
        plan = gpu_plan(batch, own, fp.PrefixLM(256), backend)
        assert_same(run(*own, plan), layer(*own, plan))
    assert counter.frame_count == 1
    folded = tuple(tensor.unflatten(0, (4, 256)) for tensor in own)
    plan = fp.plan([[(3, 200)], [], [], [(0, 256)]], like=folded, backend=backend)
    assert_same(run(*folded, plan), layer(*folded, plan))


@pytest.mark.gpu
def test_a_compiled_call_does_not_synchronise() -> None:
    own = gpu_tensors()
    plans = [gpu_plan(batch, own, fp.PrefixLM()) for batch in GPU_BATCHES]
    run, _ = compiled(layer, "inductor")
    for plan in plans:
        run(*own, plan)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for plan in plans:
            run(*own, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_capture_of_compiled_code_follows_the_serving_plan() -> None:
    """The compiled layers in a CUDA graph of the user's, replayed on the next batches."""
    pages = [batch.in_pages(*gpu_tensors(batch=batch)[1:], 16, 3) for batch in GPU_BATCHES]
    q = gpu_tensors()[0]
    cache = [torch.zeros(128, *pages[0].k.shape[1:], device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    serving = fp.serving_plan(like=(q, *cache), max_tokens=1024, max_sequences=4, max_pages=80)
    assert serving.in_place
    run, counter = compiled(layer, "inductor")

    def take(index: int) -> None:
        batch, own = GPU_BATCHES[index], pages[index]
        for whole, part in zip(cache, (own.k, own.v), strict=True):
            whole[: len(part)].copy_(part)
        spans = [list(each) for each in batch.spans]
        serving.update(spans, cu_seqlens_q=batch.cu_q, seqused_k=list(batch.as_seqlens[1]), page_table=own.table)

    take(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(q, *cache, serving)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(q, *cache, serving)
    for index in (1, 0):
        take(index)
        graph.replay()
        assert_same(got, layer(q, *cache, serving))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_transposed_tensors_under_inductor() -> None:
    """Strides are those that the graph was told of, whatever the backend gives."""
    heads_first = [torch.randn(heads, 12, 4, requires_grad=True) for heads in (2, 1, 1)]
    q, k, v = (own.transpose(0, 1) for own in heads_first)
    plan = fp.plan([[(1, 4)], [(0, 3)]], like=(q, k, v), cu_seqlens_q=[0, 5, 12], cu_seqlens_k=[0, 5, 12])

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return plan(*(own.transpose(0, 1) for own in leaves)).square().sum()

    grads = [
        torch.autograd.grad(run(*heads_first), heads_first)
        for run in (loss, torch.compile(loss, fullgraph=True, backend="inductor"))
    ]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)
