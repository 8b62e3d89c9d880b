"""What would run on a Hopper GPU, and what goes to SDPA there: decided from shapes, on tensors that have no values."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("flash_attn.cute")

import fa4_prefixlm.integrations.transformers  # noqa: F401
from fa4_prefixlm.batch.tensors import describe
from fa4_prefixlm.integrations.transformers import layer_attention as attention_module
from fa4_prefixlm.integrations.transformers import masks
from fa4_prefixlm.integrations.transformers.masks import Record, Seen
from fa4_prefixlm.runtime.bounded_plans import BoundedBatch
from fa4_prefixlm.runtime.plans import Plan

TOKENS = 512
IMAGES = Seen(intervals=1, overflow=False, from_key_0=True, longest=TOKENS, end=TOKENS, causal=False)


def made(
    monkeypatch: pytest.MonkeyPatch,
    seen: Seen,
    *,
    head_dim: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    grad: bool = False,
    flex: bool = False,
) -> Plan | str:
    """The plan, or why there is none."""
    monkeypatch.setenv("FLASH_ATTENTION_ARCH", "sm_90")
    with FakeTensorMode():
        q = torch.empty(2, TOKENS, 8, head_dim, device="cuda", dtype=dtype, requires_grad=grad)
        k = torch.empty(2, TOKENS, 4, head_dim, device="cuda", dtype=dtype)
        bounds = torch.empty(2, TOKENS, 8, device="cuda", dtype=torch.int32)
        record = Record(TOKENS, torch.empty(6), dense=lambda: bounds, seen=seen)
        return attention_module.plan_of(record, bounds, describe(q, k, k), flex=flex)


@pytest.mark.parametrize(
    ("seen", "backend"),
    [
        (IMAGES, "native"),
        (Seen(3, False, True, TOKENS, TOKENS, False), "varlen"),
        (Seen(1, False, True, TOKENS, TOKENS, True), "causal"),
        (Seen(1, False, False, 64, TOKENS, True), "causal"),
    ],
    ids=["images", "three intervals", "causal", "window"],
)
def test_backends(monkeypatch: pytest.MonkeyPatch, seen: Seen, backend: str) -> None:
    plan = made(monkeypatch, seen)
    assert isinstance(plan, Plan), plan
    assert plan.choice.name == backend


def test_native_knows_that_rows_begin_at_key_0(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = made(monkeypatch, IMAGES)
    local = made(monkeypatch, Seen(1, False, False, 64, TOKENS, False))
    assert isinstance(plan, Plan)
    assert isinstance(local, Plan)
    assert (plan.prepared.kernel.lower, local.prepared.kernel.lower) == (False, True)  # type: ignore[attr-defined]
    assert plan.prepared.kernel.tile.n > local.prepared.kernel.tile.n  # type: ignore[attr-defined]


@pytest.mark.parametrize("causal", [False, True])
def test_what_goes_to_sdpa_says_why(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    seen = Seen(1, False, True, TOKENS, TOKENS, causal)
    assert "512" in made(monkeypatch, seen, head_dim=512)
    assert "float32" in made(monkeypatch, seen, dtype=torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_head_dims_that_fa4_lacks_run_flex_attention_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, causal: bool
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(attention_module, "warn_once", warned.append)
    monkeypatch.setattr(BoundedBatch, "plan", lambda _, build, choice: choice.name)
    seen = Seen(1, False, True, TOKENS, TOKENS, causal)
    assert made(monkeypatch, seen, head_dim=512, flex=True) == "flex"
    assert "FlexAttention" in warned.pop()
    assert "512" in made(monkeypatch, seen, head_dim=512)
    assert "float32" in made(monkeypatch, seen, dtype=torch.float32, flex=True)
    assert not warned


@pytest.mark.parametrize("grad", [False, True])
def test_flex_attention_is_for_many_queries_without_gradients(monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(attention_module, "FLEX_FROM", 40)
    monkeypatch.setattr(attention_module, "plan_of", lambda *_, flex: asked.append(flex) or "no kernel")
    monkeypatch.setattr(attention_module, "warn_once", lambda _: None)
    for rows in (39, 40):
        bounds = masks.mask(1, rows, rows, device="cpu")
        q, k, v = (torch.randn(1, 2, rows, 16, requires_grad=grad) for _ in range(3))
        attention_module.attention(torch.nn.Module(), q, k, v, bounds)
    assert asked == [False, not grad]


@pytest.mark.parametrize(("grad", "head_dim", "hint"), [(True, 256, True), (True, 264, False), (False, 256, False)])
def test_flex_attention_is_named_where_it_may_train_faster(
    monkeypatch: pytest.MonkeyPatch, grad: bool, head_dim: int, hint: bool
) -> None:
    said: list[str] = []
    monkeypatch.setattr(attention_module, "plan_of", lambda *_, flex: "no kernel")
    monkeypatch.setattr(attention_module, "warn_once", said.append)
    q, k, v = (torch.randn(1, 2, 40, head_dim, requires_grad=grad) for _ in range(3))
    attention_module.attention(torch.nn.Module(), q, k, v, masks.mask(1, 40, 40, device="cpu"))
    assert [("flex_attention" in own) for own in said] == [hint]
    assert "no kernel" in said[0]


def test_rows_of_which_one_sees_nothing_are_not_plainly_causal() -> None:
    """Each but the first ends a key after the one before: more queries than keys."""
    for empty in (False, True):
        end = torch.arange(8, dtype=torch.int32) + (not empty)
        bounds = torch.stack([torch.zeros_like(end), end], dim=1).unsqueeze(0)
        seen = Seen.of(masks._to_read(bounds).numbers())
        assert seen == Seen(1, False, True, int(end.max()), int(end.max()), not empty)


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("end", [0, 1, 33])
def test_keys_that_no_row_sees_are_not_read(in_graph: bool, end: int) -> None:
    """The slots of a static cache that nobody wrote. Rows that see nothing are 0."""
    q = torch.randn(1, 4, 20, 16)
    k, v = (torch.randn(1, 2, 40, 16) for _ in range(2))
    bounds = torch.zeros(1, 1, 20, 2, dtype=torch.int32)
    bounds[..., 1] = end
    k[:, :, max(1, end) :] = v[:, :, max(1, end) :] = float("nan")
    if in_graph:
        tensors = (own.transpose(1, 2) for own in (q, k, v))
        out = torch.ops.fa4_prefixlm.bounded_attention(*tensors, bounds, None, 0.0, None)
    else:
        out, _ = attention_module.attention(torch.nn.Module(), q, k, v, bounds)
    expected = torch.zeros(1, 4, 20, 16)
    if end:
        seen = (own[:, :, :end].repeat_interleave(2, dim=1) for own in (k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(q, *seen)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_sdpa_in_a_graph_has_groups_of_heads(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], softcap: float
) -> None:
    """Where no kernel takes the layer; some are taken by SDPA, some by plain torch."""
    monkeypatch.setattr(attention_module, "plan_of", lambda *_, **__: "no kernel")
    monkeypatch.setattr(attention_module, "warn_once", lambda _: None)
    q, (k, v) = torch.randn(2, 20, heads[0], 16), (torch.randn(2, 20, heads[1], 16) for _ in range(2))
    bounds = masks.mask(2, 20, 20, device="cpu")
    assert bounds is not None
    out = torch.ops.fa4_prefixlm.bounded_attention(q, k, v, bounds, 0.3, softcap, None)
    scores = 0.3 * torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(heads[0] // heads[1], dim=2))
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = scores.masked_fill(~masks.visible(bounds, 20), float("-inf")).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(heads[0] // heads[1], dim=2))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["none", "none, not causal", "none, one row", "shared", "by heads", "added"])
@pytest.mark.parametrize("sinks", [False, True])
def test_plain_torch_is_softmax_pair_by_pair(given: str, sinks: bool) -> None:
    """Where SDPA lacks softcap and sinks: four query heads on two key heads."""
    generator = torch.Generator().manual_seed(0)
    rows, keys, causal = (1 if given == "none, one row" else 5), 5, given == "none"
    q = torch.randn(2, 4, rows, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, keys, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    sink = torch.randn(4, generator=generator) if sinks else None
    sees = torch.rand(2, 4 if given == "by heads" else 1, rows, keys, generator=generator) < 0.6
    sees[..., 0] = True
    mask = {"shared": sees, "by heads": sees, "added": torch.where(sees, 0.0, float("-inf"))}.get(given)
    is_causal = None if given in ("none", "none, one row") else False  # None: as the module says, True by default
    call = attention_module.Call(torch.nn.Module(), q, k, v, 0.5, 3.0, sink, is_causal, {})
    out, _ = attention_module.dense(call, mask)
    for batch, head, row in ((b, h, r) for b in range(2) for h in range(4) for r in range(rows)):
        scores = 3.0 * torch.tanh(0.5 * (k[batch, head // 2] @ q[batch, head, row]) / 3.0)
        seen = [
            column <= row if causal else mask is None or bool(sees[batch, head % sees.shape[1], row, column])
            for column in range(keys)
        ]
        weights = scores.exp() * torch.tensor(seen)
        total = weights.sum() + (sink[head].double().exp() if sink is not None else 0)
        torch.testing.assert_close(out[batch, row, head], (weights / total) @ v[batch, head // 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "keys", "offset", "window", "plainly_causal"),
    [(40, 40, 0, None, True), (40, 60, 20, None, False), (40, 40, 0, 12, False), (40, 60, 0, None, False)],
    ids=["whole", "chunk", "window", "longer cache"],
)
def test_what_goes_to_sdpa_is_the_mask(
    monkeypatch: pytest.MonkeyPatch, rows: int, keys: int, offset: int, window: int | None, plainly_causal: bool
) -> None:
    """SDPA's own causal mask only where it is this one: it counts queries from the first key."""
    from transformers import masking_utils

    monkeypatch.setattr(attention_module, "plan_of", lambda *_, flex: "no kernel")
    monkeypatch.setattr(attention_module, "warn_once", lambda _: None)
    asked: list[bool] = []
    sdpa = attention_module.sdpa_attention_forward
    monkeypatch.setattr(
        attention_module,
        "sdpa_attention_forward",
        lambda module, q, k, v, mask, **rest: asked.append(mask is None) or sdpa(module, q, k, v, mask, **rest),
    )
    rule = masking_utils.causal_mask_function
    if window is not None:
        rule = masking_utils.sliding_window_causal_mask_function(window)
    q = torch.randn(1, 2, rows, 16)
    k, v = (torch.randn(1, 2, keys, 16) for _ in range(2))
    bounds = masks.mask(1, rows, keys, offset, mask_function=rule)
    out, _ = attention_module.attention(torch.nn.Module(), q, k, v, bounds)
    position, key = offset + torch.arange(rows).unsqueeze(1), torch.arange(keys)
    sees = (key <= position) & (position - key < (window or keys))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert asked == [plainly_causal]
