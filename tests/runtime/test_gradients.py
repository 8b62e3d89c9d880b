"""Gradients on the CPU: the operation's own wiring against float64 autograd, the ways of training, the refusals.

The reference is differentiated by torch where it is the forward too. `own_backward` switches that off, so that calls go
the way that they go on a GPU: through the autograd function, to the backward that the plan chose.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fa4_prefixlm as fp
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.runtime import autograd, execute
from fa4_prefixlm.testing.accuracy import exact_gradients
from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch, random_mask
from fa4_prefixlm.testing.empty_rows import Blind

BATCH = Batch(((20, 20), (12, 30)), (((3, 11),), ((0, 9), (20, 25))))


@pytest.fixture
def own_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "_through_torch", lambda plan: False)


def leaves_of(batch: Batch, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (8, 8), seed: int = 0):
    return tuple(own.requires_grad_() for own in batch.tensors(heads, dims, torch.float64, "cpu", seed))


def plan_of(batch: Batch, like, mask: fp.Mask = fp.PrefixLM(), **more) -> fp.Plan:  # noqa: B008 (an immutable value)
    spans = [list(own) for own in batch.spans]
    return fp.plan(spans, like=like, cu_seqlens_q=batch.cu_q, cu_seqlens_k=batch.cu_k, mask=mask, **more)


def check(batch: Batch, mask: fp.Mask, *, heads=(4, 2), dims=(8, 8), softcap=0.0, sink=False, seed=0) -> None:
    """`(out, lse, sink)` gradients, all at once, against autograd of the oracle."""
    q, k, v = leaves_of(batch, heads, dims, seed)
    own_sink = torch.linspace(-1, 2, heads[0], dtype=torch.float64).requires_grad_() if sink else None
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(q.shape[0], heads[0], dims[1], dtype=torch.float64, generator=generator)
    dlse = torch.randn(heads[0], q.shape[0], generator=generator)
    plan = plan_of(batch, (q, k, v), mask)
    out, lse = fp.attention(q, k, v, plan, return_lse=True, softcap=softcap, learnable_sink=own_sink)
    wanted = [q, k, v] if own_sink is None else [q, k, v, own_sink]
    got = torch.autograd.grad([out, lse], wanted, [dout, dlse])
    exact = exact_gradients(
        *(q, k, v, dout, dlse),
        mask=mask,
        spans=batch.spans,
        seqlens=batch.as_seqlens,
        options=Options(dims[0] ** -0.5, softcap, own_sink),
    )
    for name, mine in zip(("q", "k", "v", "sink"), got, strict=False):
        torch.testing.assert_close(
            mine, getattr(exact, name), rtol=1e-5, atol=1e-6, msg=lambda text, at=name: at + text
        )


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(own_backward: None, seed: int) -> None:
    rng = random.Random(seed)
    options = {"softcap": rng.choice([0.0, 5.0]), "sink": rng.random() < 0.5, "dims": rng.choice([(8, 8), (16, 8)])}
    check(random_batch(rng, longest=150), random_mask(rng), heads=rng.choice([(4, 2), (3, 3), (4, 1)]), **options)


@pytest.mark.parametrize("name", UGLY)
def test_ugly_batches(own_backward: None, name: str) -> None:
    check(UGLY[name], fp.PrefixLM(40), sink=True)


@pytest.mark.parametrize("sink", [False, True])
def test_rows_that_see_nothing(own_backward: None, sink: bool) -> None:
    check(Batch(((60, 60),), (((20, 30),),)), Blind(), sink=sink)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_comes_back_for_the_lse_of_nothing_is_not_read(own_backward: None, bad: float) -> None:
    """As from `torch.where(lse > -inf, lse.square(), 0)`, which sends back 0 times infinity there."""
    batch = Batch(((60, 60),), (((20, 30),),))
    leaves = leaves_of(batch)
    out, lse = fp.attention(*leaves, plan_of(batch, leaves, Blind()), return_lse=True)
    nothing = lse == float("-inf")
    assert nothing.any()
    dlse = torch.randn(lse.shape)
    right, got = (
        torch.autograd.grad([out, lse], leaves, [out.detach(), dlse.masked_fill(nothing, own)], retain_graph=True)
        for own in (0.0, bad)
    )
    for mine, expected in zip(got, right, strict=True):
        assert torch.equal(mine, expected)


def test_a_sink_of_minus_infinity_is_none(own_backward: None) -> None:
    """Also beside rows that see nothing, whose LSE it is."""
    batch = Batch(((60, 60),), (((20, 30),),))
    leaves = leaves_of(batch)
    plan = plan_of(batch, leaves, Blind())
    sink = torch.full((4,), float("-inf"), dtype=torch.float64, requires_grad=True)
    *got, dsink = torch.autograd.grad(fp.attention(*leaves, plan, learnable_sink=sink).sum(), (*leaves, sink))
    assert (dsink == 0).all()
    for mine, right in zip(got, torch.autograd.grad(fp.attention(*leaves, plan).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("numbers", [1, 5 * 32], ids=["a row", "five rows"])
def test_the_sinks_gradient_is_summed_in_chunks_of_rows(
    own_backward: None, monkeypatch: pytest.MonkeyPatch, numbers: int
) -> None:
    """Of `(rows, 4 heads, 8)`, of which the last one is smaller, or of a row where not even that is as small."""
    monkeypatch.setattr(autograd, "SINK_CHUNK", numbers)
    check(BATCH, fp.PrefixLM(), sink=True)


@pytest.mark.parametrize("own", [False, True])
def test_gradcheck(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences."""
    if own:
        monkeypatch.setattr(execute, "_through_torch", lambda plan: False)
    batch = Batch(((5, 5), (2, 4)), (((1, 4),), ((2, 4),)))
    leaves = leaves_of(batch, heads=(2, 1), dims=(3, 3))
    plan = plan_of(batch, leaves, fp.PrefixLM(3))
    sink = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def call(q, k, v, sink):
        return fp.attention(q, k, v, plan, softcap=3.0, learnable_sink=sink)

    assert torch.autograd.gradcheck(call, (*leaves, sink))


def test_batched_tensors(own_backward: None) -> None:
    batch = Batch(((20, 24), (20, 24)), (((3, 11),), ((15, 24),)))
    packed = leaves_of(batch)
    folded = [own.detach().unflatten(0, (2, -1)).requires_grad_() for own in packed]
    out, lse = fp.attention(*packed, plan_of(batch, packed), return_lse=True)
    wanted = torch.autograd.grad((out * out).sum() + (lse * lse).sum(), packed)
    out, lse = fp.attention(*folded, [list(own) for own in batch.spans], return_lse=True)
    got = torch.autograd.grad((out * out).sum() + (lse * lse).sum(), folded)
    for mine, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.flatten(0, 1), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(own_backward: None, use_reentrant: bool) -> None:
    leaves = leaves_of(BATCH)
    plan = plan_of(BATCH, leaves)

    def block(q, k, v):
        return fp.attention(q.sin(), k, v, plan).cos()

    wanted = torch.autograd.grad(block(*leaves).sum(), leaves)
    out = checkpoint(block, *leaves, use_reentrant=use_reentrant)
    # The reentrant kind takes .backward() alone.
    out.sum().backward()
    for leaf, right in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, right)


def test_accumulation_makes_the_tables_once(own_backward: None, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = leaves_of(BATCH)
    plan = plan_of(BATCH, leaves)
    once = torch.autograd.grad((fp.attention(*leaves, plan) ** 2).sum(), leaves)
    monkeypatch.setattr("fa4_prefixlm.runtime.plans.prepare_backward", None)  # a second preparation would call it
    for _ in range(3):
        (fp.attention(*leaves, plan) ** 2).sum().backward()
    for leaf, right in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * right)


def test_only_what_needs_a_gradient_gets_one(own_backward: None) -> None:
    q, k, v = leaves_of(BATCH)
    plan = plan_of(BATCH, (q, k, v))
    out = fp.attention(q.detach(), k, v.detach(), plan)
    assert torch.autograd.grad(out.sum(), [k])[0].shape == k.shape
    with torch.no_grad():
        assert not fp.attention(q, k, v, plan).requires_grad
    assert not fp.attention(q.detach(), k.detach(), v.detach(), plan).requires_grad


def test_the_second_derivative_is_refused(own_backward: None) -> None:
    leaves = leaves_of(BATCH)
    out = fp.attention(*leaves, plan_of(BATCH, leaves))
    (grad,) = torch.autograd.grad((out**2).sum(), leaves[:1], create_graph=True)
    with pytest.raises(fp.UnsupportedError, match="no second derivative"):
        grad.sum().backward()


def test_transforms_are_refused(own_backward: None) -> None:
    q, k, v = leaves_of(BATCH)
    plan = plan_of(BATCH, (q, k, v))
    with pytest.raises(fp.UnsupportedError, match=r"no torch\.func transform"):
        torch.func.grad(lambda q: fp.attention(q, k, v, plan).sum())(q)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda call, q: torch.func.vmap(call)(torch.stack([q, q])),
        lambda call, q: torch.func.jvp(call, (q,), (q,)),
        lambda call, q: torch.func.vmap(lambda other: other + call(q))(torch.zeros(3)),
    ],
    ids=["vmap", "jvp", "vmap of another"],
)
def test_flex_refuses_transforms_without_a_gradient(transformed: Callable[..., Any]) -> None:
    q, k, v = (own.detach().float() for own in leaves_of(BATCH))
    plan = plan_of(BATCH, (q, k, v), backend="flex")
    with pytest.raises(fp.UnsupportedError, match=r"^q, k, v: expected no torch\.func transform"):
        transformed(lambda q: fp.attention(q, k, v, plan), q)


def test_the_reference_takes_transforms_and_second_derivatives() -> None:
    q, k, v = leaves_of(BATCH)
    plan = plan_of(BATCH, (q, k, v), backend="reference")
    got = torch.func.grad(lambda q: fp.attention(q, k, v, plan).sum())(q)
    (wanted,) = torch.autograd.grad(fp.attention(q, k, v, plan).sum(), [q])
    torch.testing.assert_close(got, wanted)
    (grad,) = torch.autograd.grad((fp.attention(q, k, v, plan) ** 2).sum(), [q], create_graph=True)
    assert torch.autograd.grad(grad.sum(), [q])[0].abs().sum() > 0


def test_out_beside_a_gradient_is_refused(own_backward: None) -> None:
    leaves = leaves_of(BATCH)
    out = torch.empty_like(leaves[0])
    with pytest.raises(fp.InputError, match="^out: expected None where a gradient is needed"):
        fp.attention(*leaves, plan_of(BATCH, leaves), out=out)
    with torch.no_grad():
        assert fp.attention(*leaves, plan_of(BATCH, leaves), out=out) is out


def test_deterministic(own_backward: None) -> None:
    """As the call says, and torch's switch where it says nothing; each has its own tables."""
    leaves = leaves_of(BATCH)
    plan = plan_of(BATCH, leaves)
    fp.attention(*leaves, plan)
    assert set(plan._gradients) == {False}
    fp.attention(*leaves, plan, deterministic=True)
    assert set(plan._gradients) == {False, True}
    plan = plan_of(BATCH, leaves)
    torch.use_deterministic_algorithms(True)
    try:
        fp.attention(*leaves, plan)
        fp.attention(*leaves, plan, deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(plan._gradients) == {False, True}
    with pytest.raises(fp.InputError, match="^deterministic: expected True, False or None"):
        fp.attention(*leaves, plan, deterministic="yes")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 3 * 16)

    def forward(self, hidden: torch.Tensor, plan: fp.Plan) -> torch.Tensor:
        q, k, v = (own.unflatten(-1, (2, 8)) for own in self.project(hidden).chunk(3, dim=-1))
        return hidden + fp.attention(q, k, v, plan).flatten(1)


def test_fsdp2(own_backward: None, tmp_path) -> None:
    """A module that FSDP2 wrapped, in one process: the gradients of the plain module."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        model = torch.nn.ModuleList([Layer(), Layer()])
        hidden = torch.randn(BATCH.cu_q[-1], 16)
        batch = Batch(tuple((rows, rows) for rows, _ in BATCH.seqlens), (((3, 11),), ((0, 9),)))
        like = hidden.view(-1, 2, 8)
        plan = plan_of(batch, (like, like, like))

        def step() -> list[torch.Tensor]:
            out = hidden
            for layer in model:
                out = layer(out, plan)
            out.square().sum().backward()
            return [own.grad for own in model.parameters()]

        wanted = [grad.clone() for grad in step()]
        model.zero_grad()
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model:
            fsdp.fully_shard(layer, mesh=mesh)
        for mine, right in zip(step(), wanted, strict=True):
            torch.testing.assert_close(mine.full_tensor(), right)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("keys", [0, 5])
@pytest.mark.parametrize("backend", ["auto", "flex"])
def test_a_batch_without_queries_has_gradients(backend: str, keys: int) -> None:
    """A rank whose batch is empty takes part in the backward: all are 0."""
    q, k, v = (torch.randn(tokens, 2, 16, requires_grad=True) for tokens in (0, keys, keys))
    out = fp.attention(q, k, v, [[]], cu_seqlens_q=[0, 0], cu_seqlens_k=[0, keys], backend=backend)
    out.sum().backward()
    for own in (q, k, v):
        assert own.grad is not None
        assert not own.grad.any()


def test_out_where_a_gradient_is_needed() -> None:
    q = torch.randn(6, 2, 16, requires_grad=True)
    cu = {"cu_seqlens_q": [0, 6], "cu_seqlens_k": [0, 6]}
    with pytest.raises(fp.InputError, match="out: expected None where a gradient is needed"):
        fp.attention(q, q, q, [[]], out=torch.empty(6, 2, 16), **cu)
