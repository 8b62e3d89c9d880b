"""The backend cudnn on a stand-in that keeps the contract which the package's source states, and does its worst.

What the real one computes is judged on a GPU, in `test_gpu_cudnn`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import random
from types import SimpleNamespace

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.backends import cudnn
from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.backends.cudnn import Cudnn, CudnnCall
from fa4_prefixlm.backends.cudnn_backward import CudnnBackward
from fa4_prefixlm.backends.flex import Flex
from fa4_prefixlm.backends.reference import attend
from fa4_prefixlm.backends.select import Choice, Forward, choose
from fa4_prefixlm.backends.select_backward import Backward
from fa4_prefixlm.batch import lengths
from fa4_prefixlm.batch.forward_pass import ForwardPass
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.builds.describe import BEST
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.masks import EMPTY_LO, causal, key_in, window
from fa4_prefixlm.testing.accuracy import exact_attention, exact_gradients
from fa4_prefixlm.testing.batches import UGLY, Batch, masks_for, random_batch, random_mask
from fa4_prefixlm.testing.empty_rows import Blind
from tests.backends.calls import DEMAND, GPU_CALL

HEADS, DIMS = (4, 2), (16, 16)
TWO = Batch(((300, 300), (70, 90)), ())
MANY = causal & (key_in("image") | window(20))
SPANS = {"image": [[(at, at + 7) for at in range(0, 240, 30)], [(0, 9)]]}


def create_mask_plan(ends, q, k, v, *, build_backward):
    """Its checks of what it is given, and the dense mask."""
    assert ends.dtype == torch.int32
    assert ends.is_contiguous()
    heads, count, rows = ends.shape
    assert (heads, count % 2, rows) == (1, 1, q.shape[1])
    assert all(own.stride(-1) == 1 and own.ndim == 4 for own in (q, k, v))
    keys = k.shape[1]
    edges = torch.cat([torch.zeros(1, rows, dtype=torch.int32), ends[0]]).T
    assert (edges.diff(dim=1) >= 0).all(), "its planner refuses ends that fall"
    assert edges.max() <= keys
    key = torch.arange(keys)
    seen = ((key >= edges[:, 0::2, None]) & (key < edges[:, 1::2, None])).any(1)
    return SimpleNamespace(seen=seen, backward=build_backward)


def flex_attn_func(q, k, v, *, mask_plan, softmax_scale, return_lse):
    """Dense, with NaN where a row sees nothing: that a kernel writes it is not relied on."""
    assert return_lse
    out, lse = attend(q[0], k[0], v[0], mask_plan.seen, Options(softmax_scale))
    blind = ~mask_plan.seen.any(1)
    return out.masked_fill(blind[:, None, None], math.nan)[None], lse.masked_fill(blind, math.nan)[None]


class FlexAttentionBwd:
    """Gradients from the given `out` and `lse`, with NaN for keys that nobody sees."""

    workspace_size = 16

    def __init__(self, q, k, v, out, dout, lse, dq, dk, dv, plan, dlse=None) -> None:
        self.done: list[str] = []

    def check_support(self) -> None:
        self.done.append("checked")

    def compile(self) -> None:
        assert self.done == ["checked"]
        self.done.append("compiled")

    def execute(self, q, k, v, out, dout, lse, dq, dk, dv, plan, dlse=None, *, workspace, softmax_scale) -> None:
        assert self.done == ["checked", "compiled"]
        assert plan.backward
        assert torch.isfinite(lse).all()
        assert workspace.numel() == self.workspace_size
        q, k, v = (own[0].double().detach().requires_grad_() for own in (q, k, v))
        with torch.enable_grad():
            found, own_lse = attend(q, k, v, plan.seen, Options(softmax_scale))
            lost = (found * dout[0]).sum()
            if dlse is not None:
                lost = lost + (own_lse * dlse[0])[torch.isfinite(own_lse)].sum()
            grads = torch.autograd.grad(lost, (q, k, v))
        unseen = ~plan.seen.any(0)
        dq[0].copy_(grads[0].masked_fill(~plan.seen.any(1)[:, None, None], math.nan))
        for given, own in zip((dk, dv), grads[1:], strict=True):
            given[0].copy_(own.masked_fill(unseen[:, None, None], math.nan))


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(
        create_mask_plan=create_mask_plan, flex_attn_func=flex_attn_func, FlexAttentionBwd=FlexAttentionBwd
    )
    monkeypatch.setattr(cudnn, "api", lambda: made)
    monkeypatch.setattr("fa4_prefixlm.backends.cudnn_backward.api", lambda: made)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.32.0")


def batch_of(batch: Batch, mask: fp.Mask, spans=None) -> tuple[MaskedBatch, list[torch.Tensor]]:
    tensors = list(batch.tensors(HEADS, DIMS, torch.float32, "cpu"))
    where = {"cu_seqlens_q": batch.cu_q, "cu_seqlens_k": batch.cu_k}
    plan = fp.plan(batch.spans if spans is None else spans, like=tuple(tensors), mask=mask, backend="flex", **where)
    return plan._batch, tensors


def named(batch: Batch, spans):
    return batch.spans if spans is None else {name: tuple(map(tuple, each)) for name, each in spans.items()}


def cases():
    rng = random.Random(3)
    yield from ((random_batch(rng, longest=300), random_mask(rng), None) for _ in range(8))
    yield from ((own, mask, None) for own in UGLY.values() for mask in masks_for(own))
    yield TWO, MANY, SPANS
    yield Batch(((300, 300), (50, 50)), (((250, 280),), ())), Blind(), None
    yield Batch(((100, 200), (0, 40)), (((150, 180),), ())), fp.PrefixLM(50), None  # keys that nobody sees


@pytest.mark.slow
def test_forward_and_backward() -> None:
    for batch, mask, spans in cases():
        own, (q, k, v) = batch_of(batch, mask, spans)
        options = Options(0.3)
        given = torch.full((len(q), HEADS[0], DIMS[1]), math.nan)
        out, lse = Cudnn().prepare(own).run(q, k, v, options, given)
        assert out.data_ptr() == given.data_ptr()
        exact = {"mask": mask, "spans": named(batch, spans), "seqlens": batch.as_seqlens, "options": options}
        wanted, wanted_lse = exact_attention(q, k, v, **exact)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)
        state = CudnnBackward().prepare(own, deterministic=False)
        for dlse in (None, torch.randn(lse.shape).masked_fill(lse == -math.inf, 0)):
            dout = torch.randn(out.shape)
            grads = state.run(ForwardPass(q, k, v, out, lse), dout, dlse, options)
            right = exact_gradients(q, k, v, dout, dlse, **exact)
            for mine, name in zip(grads, "qkv", strict=True):
                torch.testing.assert_close(mine.double(), getattr(right, name), rtol=1e-4, atol=1e-5)


def test_no_keys_at_all() -> None:
    own, seen = batch_of(Batch(((5, 9),), ((),)), key_in("image"), {"image": [[]]})
    empty = Batch(((0, 0), (5, 0)), ((), ()))
    tensors = empty.tensors(HEADS, DIMS, torch.float32, "cpu")
    where = {"cu_seqlens_q": empty.cu_q, "cu_seqlens_k": empty.cu_k}
    plan = fp.plan({"image": [[], []]}, like=tensors, mask=key_in("image"), backend="flex", **where)
    for batch, given in ((own, seen), (plan._batch, tensors)):
        q, k, v = given
        out, lse = Cudnn().prepare(batch).run(q, k, v, Options(1.0), None)
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        grads = (
            CudnnBackward()
            .prepare(batch, deterministic=False)
            .run(ForwardPass(q, k, v, out, lse), torch.ones_like(out), None, Options(1.0))
        )
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.slow
@pytest.mark.parametrize("options", [Options(0.3, softcap=20.0), Options(0.3, learnable_sink=torch.zeros(4))], ids=str)
def test_softcap_and_sinks_are_refused_by_name_and_run_on_flex_else(options: Options) -> None:
    own, (q, k, v) = batch_of(TWO, MANY, SPANS)
    name = "softcap" if options.softcap else "learnable_sink"
    with pytest.raises(fp.UnsupportedError, match=f"{name}.*backend='flex' takes it"):
        Cudnn().prepare(own).run(q, k, v, options, None)
    state = CudnnBackward().prepare(own, deterministic=False)
    with pytest.raises(fp.UnsupportedError, match=name):
        state.run(ForwardPass(q, k, v, q, q[:, :, 0].T), q, None, options)
    unasked = Choice(Forward("cudnn", "causal passed over"), Backward("flex", "")).prepare(own)
    assert isinstance(unasked, CudnnCall)
    found = unasked.run(q, k, v, options, None)
    wanted = Flex().prepare(own).run(q, k, v, options, None)
    assert all(torch.equal(mine, right) for mine, right in zip(found, wanted, strict=True))
    assert ("else", "softcap and sinks run on flex") in unasked.describe()
    asked = Choice(Forward("cudnn", "asked for by name"), Backward("flex", "")).prepare(own)
    assert isinstance(asked, CudnnCall)
    assert asked.or_flex is None


def test_intervals_that_no_row_has_are_left_out() -> None:
    """The plan's bound counts them where one row has told that rows see many."""
    bounds = batch_of(TWO, MANY, SPANS)[0].packed_bounds
    lo, hi = (torch.nn.functional.pad(*own) for own in ((bounds.lo, (0, 5), "constant", EMPTY_LO), (bounds.hi, (0, 5))))
    wide = Bounds(lo, hi)
    kept, wanted = cudnn.in_use(wide), int((bounds.lo < bounds.hi).sum(1).max())
    assert kept.count == wanted
    assert torch.equal(kept.lo, bounds.lo[:, :wanted])
    assert torch.equal(kept.hi, bounds.hi[:, :wanted])
    assert cudnn.in_use(Bounds(wide.lo[:0], wide.hi[:0])).count == 1
    behind = cudnn.in_use(Bounds(wide.lo.flip(1), wide.hi.flip(1)))  # a mask of somebody else's may say so
    assert torch.equal(behind.lo, kept.lo.flip(1))
    assert torch.equal(behind.hi, kept.hi.flip(1))


def test_tensors_that_its_kernels_cannot_read_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "ALIGNMENT", 64)  # that of the CPU's allocator
    whole = torch.randn(10, 4, 8)
    assert cudnn.aligned(whole).data_ptr() == whole.data_ptr()
    for awkward in (whole[:, ::2], torch.randn(1 + 10 * 32)[1:].view(10, 4, 8)):
        copy = cudnn.aligned(awkward)
        assert torch.equal(copy, awkward)
        assert copy.is_contiguous()
        assert copy.data_ptr() % cudnn.ALIGNMENT == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": torch.device("cpu")}, "cuDNN needs a GPU"),
        ({"arch": 80}, "runs on sm_90, sm_100, sm_103, not sm_80"),
        ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
        ({"head_dim": 192, "head_dim_v": 192}, "head dims up to 128"),
        ({"head_dim": 20, "head_dim_v": 20}, "multiples of 8"),
        ({"head_dim": 192}, None),
        ({"head_dim": 256, "head_dim_v": 256}, None),
        ({"head_dim": 72, "head_dim_v": 40}, None),
    ],
)
def test_what_it_takes(change: dict, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "_not_installed", lambda: None)
    refusal = Cudnn().refusal(dataclasses.replace(GPU_CALL, **change), DEMAND, None)
    assert refusal is None if why is None else why in (refusal or "")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"head_dim": 192}, "as many key heads"),
        ({"head_dim": 192, "heads_kv": 4}, None),
        ({"head_dim": 256, "head_dim_v": 256}, None),
        ({"head_dim": 256, "head_dim_v": 256, "arch": 100}, "no gradient of the LSE on SM100"),
        ({"deterministic": True}, "deterministic order was not tried"),
        ({"tagged": True}, "it takes intervals"),
    ],
)
def test_what_its_backward_takes(change: dict, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "_not_installed", lambda: None)
    traits = dataclasses.replace(DEMAND, tagged=change.pop("tagged", False))
    deterministic = change.pop("deterministic", False)
    call = dataclasses.replace(GPU_CALL, **change)
    refusal = CudnnBackward().refusal(call, traits, None, deterministic=deterministic)
    assert refusal is None if why is None else why in (refusal or "")


@pytest.mark.parametrize(
    ("version", "why"), [("1.32.0", None), ("2.0", None), ("1.31.9", "older than 1.32"), ("dev", "older than 1.32")]
)
def test_which_version(version: str, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # conftest's answer for other tests
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    cudnn._not_installed.cache_clear()
    found = cudnn._not_installed()
    cudnn._not_installed.cache_clear()
    assert found is None if why is None else why in (found or "")


def test_it_is_preferred_to_flex_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "_not_installed", lambda: None)
    sizes = lengths.batched(1, 1000, 1000, torch.device("cpu"))
    names = {}
    for count in (1, 4, 5, 40):
        traits = dataclasses.replace(DEMAND, intervals=count, banded=False, causal_part=None)
        found = choose("auto", GPU_CALL, traits, sizes, BEST)
        names[count] = (found.name, found.backward.name)
    assert names == {
        1: ("native", "native"),
        4: ("varlen", "native"),
        5: ("cudnn", "native"),
        40: ("cudnn", "native"),
    }
