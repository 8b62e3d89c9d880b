"""What `test_accepted_inputs` and `test_chunked_prefill` hold on the reference, on every backend that takes it."""

from __future__ import annotations

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.masks import causal, everything, from_flex, gemma3, in_documents, key_in, rswa, same_span
from fa4_prefixlm.testing.accuracy import exact_attention, relative_error
from fa4_prefixlm.testing.bands import row_errors

pytestmark = pytest.mark.gpu

BAND = 3e-3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("backend", ["auto", "native", "varlen", "two_pass", "flex", "reference"])
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_static_cache(rows: int, backend: str, on_device: bool) -> None:
    mask, used = fp.PrefixLM(100), [300, 512, 70]
    ranges = [[(20, 160)], [(400, 500)], []]
    q, k, v = normal(3, rows, 4, 128), normal(3, 512, 2, 128, seed=1), normal(3, 512, 2, 128, seed=2)
    filled = [k.clone(), v.clone()]
    for cache in filled:
        for index, keys in enumerate(used):
            cache[index, keys:] = 0.0  # room that is not filled must be finite
    seqused = torch.tensor(used, dtype=torch.int32, device="cuda") if on_device else used
    out, lse = fp.attention(q, *filled, ranges, mask=mask, seqused_k=seqused, backend=backend, return_lse=True)
    packed = [torch.cat([cache[index, :keys] for index, keys in enumerate(used)]) for cache in filled]
    seqlens = ((rows,) * 3, tuple(used))
    spans = tuple(tuple(own) for own in ranges)
    exact, exact_lse = exact_attention(q.flatten(0, 1), *packed, mask=mask, spans=spans, seqlens=seqlens)
    assert relative_error(out.flatten(0, 1), exact) < BAND
    assert row_errors(out.flatten(0, 1), exact).max() < 2e-2
    assert (lse.transpose(0, 1).flatten(1).double() - exact_lse).abs().max() < 1e-3


@pytest.mark.parametrize("backend", ["auto", "varlen", "packed", "flex", "reference"])
@pytest.mark.parametrize("spans", [1, 3])
def test_more_queries_than_keys(backend: str, spans: int) -> None:
    ranges = [[(3, 40), (50, 51), (60, 130)][:spans], [(0, 70)]]
    q, k, v = normal(900, 4, 128), normal(240, 2, 128, seed=1), normal(240, 2, 128, seed=2)
    cu_q, cu_k = [0, 500, 900], [0, 140, 240]
    out, lse = fp.attention(
        q, k, v, ranges, mask=key_in("image"), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend=backend, return_lse=True
    )
    named = tuple(tuple(own) for own in ranges)
    exact, exact_lse = exact_attention(q, k, v, mask=key_in("image"), spans=named, seqlens=((500, 400), (140, 100)))
    assert relative_error(out, exact) < BAND
    assert row_errors(out, exact).max() < 2e-2
    assert (lse.double() - exact_lse).abs().max() < 1e-3


@pytest.mark.parametrize("backend", ["auto", "native", "varlen", "packed"])
def test_cross_attention_to_everything(backend: str) -> None:
    """More queries than keys, fewer, and no keys at all."""
    q, k, v = normal(900, 4, 128), normal(790, 2, 128, seed=1), normal(790, 2, 128, seed=2)
    cu_q, cu_k = [0, 500, 800, 900], [0, 140, 790, 790]
    out, lse = fp.attention(
        q, k, v, mask=everything, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend=backend, return_lse=True
    )
    seqlens = ((500, 300, 100), (140, 650, 0))
    exact, exact_lse = exact_attention(q, k, v, mask=everything, spans={}, seqlens=seqlens)
    assert relative_error(out, exact) < BAND
    assert row_errors(out[:800], exact[:800]).max() < 2e-2
    assert (lse[:, :800].double() - exact_lse[:, :800]).abs().max() < 1e-3
    assert not out[800:].any()
    assert (lse[:, 800:] == -torch.inf).all()


@pytest.mark.parametrize("backend", ["auto", "native", "varlen", "packed", "flex", "reference"])
@pytest.mark.parametrize(
    "mask",
    [same_span("image"), causal & key_in("image"), from_flex(lambda b, h, q, kv: kv < 0)],
    ids=["span", "keys", "flex"],
)
def test_a_step_that_sees_nothing(mask: fp.Mask, backend: str) -> None:
    if mask.evaluated and backend == "native":
        pytest.skip("native takes masks of one interval a row, and a function is taken to have more")
    q, k, v = normal(700, 4, 128), normal(700, 2, 128, seed=1), normal(700, 2, 128, seed=2)
    ranges = [[], []] if mask.names else None
    cu = [0, 300, 700]
    torch.full((2**20,), torch.nan, device="cuda")  # freed at once: what nobody writes is NaN
    out, lse = fp.attention(
        q, k, v, ranges, mask=mask, cu_seqlens_q=cu, cu_seqlens_k=cu, backend=backend, return_lse=True
    )
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


CUT = {
    "rswa": (rswa.all_layers(64), [(0, 300)]),
    "causal documents": (in_documents(causal), [(0, 256), (256, 600)]),
    "causal prompt": (causal & same_span("prompt"), [(0, 600)]),
    "real keys": (causal & key_in("real"), [(130, 600)]),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("way", ["pages", "contiguous", "serving"])
def test_spans_that_may_be_cut(name: str, on_device: bool, way: str) -> None:
    mask, spans = CUT[name]
    q, k, v = normal(600, 4, 128), normal(608, 2, 128, seed=1), normal(608, 2, 128, seed=2)
    exact, _ = exact_attention(q, k[:600], v[:600], mask=mask, spans=(tuple(spans),), seqlens=((600,), (600,)))
    caches = [tensor.unflatten(0, (-1, 16)) for tensor in (k, v)]
    table = torch.arange(38, dtype=torch.int32, device="cuda")[None]
    for begin, end in ((0, 200), (200, 333), (333, 600)):
        ranges: object = [spans]
        cu: object = [0, end - begin]
        used: object = [end]
        if on_device:
            ranges = torch.tensor(ranges, dtype=torch.int32, device="cuda")
            cu, used = (torch.tensor(own, dtype=torch.int32, device="cuda") for own in (cu, used))
        rows = q[begin:end]
        if way == "contiguous":
            cu_k = torch.tensor([0, end], dtype=torch.int32, device="cuda") if on_device else [0, end]
            out = fp.attention(rows, k[:end], v[:end], ranges, mask=mask, cu_seqlens_q=cu, cu_seqlens_k=cu_k)
        elif way == "pages":
            out = fp.attention(rows, *caches, ranges, mask=mask, cu_seqlens_q=cu, seqused_k=used, page_table=table)
        else:
            plan = fp.serving_plan(like=(q, *caches), max_tokens=600, max_sequences=1, max_pages=38, mask=mask)
            plan.update(ranges, cu_seqlens_q=cu, seqused_k=used, page_table=table, total_q=end - begin)
            out = plan(rows, *caches)
        assert relative_error(out, exact[begin:end]) < BAND
        assert row_errors(out, exact[begin:end]).max() < 2e-2
    torch.cuda.synchronize()


@pytest.mark.parametrize("packed", [True, False])
def test_spans_of_token_types_on_the_device_do_not_synchronise(packed: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    types = (torch.rand(900, generator=generator, device="cuda") < 0.98).long()  # a few long runs
    cu = torch.tensor([0, 300, 300, 900] if packed else [0, 450, 900], dtype=torch.int32, device="cuda")
    q, k, v = normal(900, 4, 128), normal(900, 2, 128, seed=1), normal(900, 2, 128, seed=2)
    where = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    given = {"cu_seqlens": cu} if packed else {}
    shaped = types if packed else types.view(2, 450)
    out = torch.empty(0)
    for mode in ("default", "error"):  # the first compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            spans = gemma3.spans_from_token_types(shaped, max_spans=40, **given)
            out = fp.attention(q, k, v, spans, **where)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lists = gemma3.spans_from_token_types(shaped.cpu(), **({"cu_seqlens": cu.cpu()} if packed else {}))
    assert [[pair for pair in own if pair != [0, 0]] for own in spans.tolist()] == [
        list(map(list, own)) for own in lists
    ]
    torch.testing.assert_close(out, fp.attention(q, k, v, lists, **where), rtol=0, atol=0)
