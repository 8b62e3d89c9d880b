"""vLLM's metadata to plans: vLLM's mask pair by pair, padded and windowed batches as vLLM has them, errors."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.builds import describe as builds
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.integrations.vllm import (
    VENDORED,
    find_build,
    layer_mask,
    place,
    spans_from_mm_ranges,
    split_cache,
)
from fa4_prefixlm.masks import causal, window
from tests.integrations.vllm_steps import (
    MODELS,
    UPSTREAM,
    Model,
    Request,
    Shape,
    Step,
    brute_mask,
    random_request,
    run_layer,
    starts_of,
)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_masks_are_those_of_vllm(model: Model) -> None:
    rng, mask, seen = random.Random(0), model.mask(), set()
    for _ in range(60):
        requests = [random_request(rng) for _ in range(4)]
        spans = spans_from_mm_ranges(
            {index: list(request.ranges) for index, request in enumerate(requests)},
            query_start_loc=starts_of(requests),
            seq_lens=[request.keys for request in requests],
            window=model.model_window,
            clamp=model.clamp,
        )
        for index, request in enumerate(requests):
            own = spans[index] if spans is not None and mask.names else None
            dense = mask.dense(seqlen=request.keys, seqlen_q=request.rows, ranges=own)
            assert torch.equal(dense, brute_mask(request, model)), request
            for start, end in own or ():
                assert start < request.keys
                assert end > request.context
            seen.add(own is not None and len(own))
    assert not mask.names or {0, 1, 2} <= seen  # texts, chunks of one image and of many


def test_each_rule_differs_where_it_should() -> None:
    """So that the comparison above can fail: a long span, seen from its last token."""
    request = Request(0, 60, ((10, 49),))
    masks = {name: brute_mask(request, model)[49] for name, model in MODELS.items()}
    assert masks["gemma3 local"].nonzero().flatten().tolist() == list(range(26, 50))  # dropped
    assert masks["gemma4 local"].nonzero().flatten().tolist() == list(range(26, 50))  # clamped
    assert masks["paligemma"].nonzero().flatten().tolist() == list(range(50))
    assert brute_mask(request, MODELS["gemma4 local"])[20].nonzero().flatten().tolist() == list(range(50))
    assert brute_mask(request, MODELS["gemma3 local"])[20].nonzero().flatten().tolist() == list(range(21))
    unclamped = Model(24, None)
    assert brute_mask(request, unclamped)[49].nonzero().flatten().tolist() == list(range(10, 50))
    assert torch.equal(unclamped.mask().dense(seqlen=60, ranges=[(10, 50)]), brute_mask(request, unclamped))


def test_text_needs_no_spans() -> None:
    where = {"query_start_loc": [0, 1, 9, 9], "seq_lens": [70, 20, 0]}
    assert spans_from_mm_ranges(None, **where) is None
    assert spans_from_mm_ranges({}, **where) is None
    assert spans_from_mm_ranges({0: [], 1: []}, **where) is None
    assert spans_from_mm_ranges({0: [(4, 59)], 1: [(0, 11), (20, 300)]}, **where) is None  # behind, and to come
    assert spans_from_mm_ranges({1: [(15, 15), (17, 16)]}, **where) is None  # ranges of one token are none in vLLM
    assert spans_from_mm_ranges({0: [(2, 8)]}, query_start_loc=[0, 0], seq_lens=[5]) is None  # not scheduled
    assert spans_from_mm_ranges({1: [(15, 18)], 2: [(0, 9)]}, **where) == [[], [(15, 19)], []]
    assert spans_from_mm_ranges({1: [(3, 18)]}, **where) == [[], [(3, 19)], []]  # it began in the cache
    assert spans_from_mm_ranges({1: [(3, 18)]}, window=16, **where) == [[], [(3, 19)], []]
    assert spans_from_mm_ranges({1: [(3, 18)]}, window=15, **where) is None
    assert spans_from_mm_ranges({1: [(3, 18)]}, window=15, clamp=True, **where) == [[], [(3, 19)], []]


def test_layers_without_a_window_have_nothing_to_clamp() -> None:
    assert layer_mask(None, clamp=True) == layer_mask(None, clamp=False) == fp.PrefixLM()
    assert layer_mask(9, clamp=True) != layer_mask(9, clamp=False)
    assert layer_mask(None, clamp=True, prefix_lm=False) == causal
    assert layer_mask(9, clamp=True, prefix_lm=False) == causal & window(9)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_steps_of_a_group(name: str, heads: tuple[int, int]) -> None:
    model, rng, shape = MODELS[name], random.Random(name), Shape(heads)
    plans = shape.plans({"first": model.mask(), "second": model.mask()})
    assert len(plans.plans) == 1
    texts = 0
    for _ in range(12):
        requests = [random_request(rng) for _ in range(rng.randint(1, 5))]
        step = Step.of(requests, shape, model.window, rng)
        plans.update(**step.metadata, mm_ranges=step.mm_ranges(model)) if rng.random() < 0.7 else plans.update(
            **{**step.metadata, "seq_lens_cpu": step.metadata["seq_lens"]},
            mm_ranges=step.mm_ranges(model),
            exact_on_host=True,
        )
        for layer in plans._plan_of:
            torch.testing.assert_close(run_layer(plans, layer, step), step.exact(model), rtol=1e-12, atol=1e-12)
        wanted = not any(
            start < request.keys and end > request.context
            for request in requests
            for start, end in request.spans(model)
        )
        assert plans.text_only == wanted
        texts += wanted
    assert texts < 12


def test_one_group_may_hold_layers_of_several_masks() -> None:
    """Gemma 3 with vLLM's hybrid cache manager off; and layers whose spans are off beside others."""
    rng, shape = random.Random(1), Shape()
    kinds = {"local": MODELS["gemma3 local"], "global": MODELS["gemma3 global"], "plain": Model(None, 24, False, False)}
    plans = shape.plans({name: model.mask() for name, model in kinds.items()})
    assert len(plans.plans) == 3
    step = Step.of([Request(3, 60, ((4, 20), (30, 49))), Request(70, 1, ((0, 23),))], shape, None, rng)
    plans.update(**step.metadata, mm_ranges=step.mm_ranges(kinds["local"]))
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    options = Options(0.3, 20.0, sinks)
    for name, model in kinds.items():
        out = run_layer(plans, name, step, softmax_scale=0.3, softcap=20.0, sinks=sinks)
        torch.testing.assert_close(out, step.exact(model, options), rtol=1e-12, atol=1e-12)
    assert not torch.equal(run_layer(plans, "local", step), run_layer(plans, "plain", step))


def test_a_step_that_is_placed_once_for_several_groups() -> None:
    rng, shape, model = random.Random(4), Shape(), MODELS["gemma3 local"]
    step = Step.of([Request(3, 60, ((4, 20), (30, 49))), Request(70, 1, ((0, 23),))], shape, None, rng)
    host = {"query_start_loc": step.metadata["query_start_loc_cpu"], "seq_lens": step.metadata["seq_lens_cpu"]}
    placed = place(**host, mm_ranges=step.mm_ranges(model))
    assert placed.spans is not None
    copied = placed.spans_on(torch.device("cpu"))
    assert copied is placed.spans_on(torch.device("cpu"))
    assert [[tuple(span) for span in own if span[1]] for own in copied.tolist()] == placed.spans
    assert place(**host, mm_ranges={1: [(0, 23)]}).spans_on(torch.device("cpu")) is None
    on_device = {name: step.metadata[name] for name in ("query_start_loc", "seq_lens", "block_table")}
    for _ in range(2):
        plans = shape.plans({"layer": model.mask()})
        plans.take(placed, **on_device)
        torch.testing.assert_close(run_layer(plans, "layer", step), step.exact(model), rtol=1e-12, atol=1e-12)


def test_a_cache_that_is_split_once() -> None:
    rng, shape, model = random.Random(2), Shape(heads=(3, 1)), MODELS["paligemma"]
    step = Step.of([Request(0, 40, ((4, 20),))], shape, None, rng)
    keys, values = split_cache(step.cache)
    assert keys.shape == values.shape == (step.cache.shape[0], 16, 1, 16)
    assert keys.stride(3) == 1
    assert values.data_ptr() - keys.data_ptr() == 16 * 8
    plans = shape.plans({"layer": model.mask()})
    plans.update(**step.metadata, mm_ranges=step.mm_ranges(model))
    out = torch.empty_like(step.q)
    plans.attention("layer", step.q, (keys, values), out)
    assert torch.equal(out[: step.total], run_layer(plans, "layer", step))


def test_strides_of_dimensions_of_one_element_are_made_regular() -> None:
    odd = torch.arange(3 * 16 * 32.0).as_strided((3, 1, 16, 32), (512, 1, 32, 1))  # one key head, "stride 1"
    for part, wanted in zip(split_cache(odd), odd.squeeze(1).chunk(2, dim=2), strict=True):
        assert part.stride() == (512, 32, 32, 1)
        assert torch.equal(part.squeeze(2), wanted)


def test_warm_up_needs_no_batch() -> None:
    shape, model = Shape(), MODELS["gemma3 local"]
    plans = shape.plans({"local": model.mask(), "global": layer_mask(None, clamp=False)})
    step = Step.of([Request(0, 40, ((4, 20),))], shape, None, random.Random(3))
    plans.warm_up(step.cache, softcap=30.0)
    assert plans.text_only
    plans.update(**step.metadata, mm_ranges=step.mm_ranges(model))
    torch.testing.assert_close(run_layer(plans, "local", step), step.exact(model), rtol=1e-12, atol=1e-12)


def test_warm_up_needs_no_cache_and_says_what_it_made() -> None:
    shape, said = Shape(), []
    plans = shape.plans({"local": MODELS["gemma3 local"].mask(), "global": causal, "again": causal})
    plans.warm_up(progress=lambda what, seconds: said.append((what, seconds >= 0)))
    local, everywhere = "PrefixLM(window=24, clamp=False)", "causal"
    kinds = ("with spans", "without spans")
    assert said == [(f"{mask}, {kind}", True) for kind in kinds for mask in (local, everywhere)]
    assert plans.text_only


def test_an_empty_batch() -> None:
    shape, model = Shape(), MODELS["gemma3 local"]
    plans = shape.plans({"local": model.mask()})
    step = Step.of([Request(0, 0, ())], shape, None, random.Random(3))
    plans.update(**step.metadata, mm_ranges={})
    assert run_layer(plans, "local", step).shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (
            {1: [(15, 20)]},
            r"mm_ranges\[1\]: expected ranges that end within the 20 tokens so far, got \(15, 20\); a chunk",
        ),
        ({1: [(19, 25)]}, r"mm_ranges\[1\]: .* see safe_chunk_end"),
        ({1: [(3, 40)]}, r"mm_ranges\[1\]: .* see safe_chunk_end"),
        ({1: [(8, 14), (14, 18)]}, r"mm_ranges\[1\]: expected ranges that do not overlap, got one from 14 on"),
        ({1: [(-3, 18)]}, r"mm_ranges\[1\]: expected ranges that start at 0 or later, got one from -3 on"),
        ({3: []}, "mm_ranges: expected requests of 0 to 2, got 3"),
        ({-1: []}, "mm_ranges: expected requests of 0 to 2, got -1"),
    ],
)
def test_ranges_that_cannot_be(ranges: dict[int, list[tuple[int, int]]], message: str) -> None:
    with pytest.raises(fp.InputError, match=message):
        spans_from_mm_ranges(ranges, query_start_loc=[0, 1, 9, 9], seq_lens=[70, 20, 0])


def test_other_mistakes() -> None:
    with pytest.raises(fp.InputError, match="seq_lens_cpu: expected 2 entries, one per request"):
        spans_from_mm_ranges({}, query_start_loc=[0, 1, 9], seq_lens=[70])
    with pytest.raises(fp.InputError, match="query_start_loc_cpu: expected values on the host"):
        spans_from_mm_ranges({}, query_start_loc=torch.zeros(2, dtype=torch.int32, device="meta"), seq_lens=[70])
    with pytest.raises(fp.InputError, match="window"):
        layer_mask(0, clamp=True)
    with pytest.raises(fp.InputError, match="layers: expected at least one layer"):
        Shape().plans({})
    with pytest.raises(fp.InputError, match="kv_cache: expected shape"):
        split_cache(torch.zeros(2, 3, 4))
    with pytest.raises(fp.InputError, match="build"):
        Shape().plans({"layer": causal}, build="no.such.build")
    shape, model = Shape(), MODELS["gemma3 local"]
    plans = shape.plans({"layer": model.mask()})
    step = Step.of([Request(0, 40, ((4, 20),))], shape, None, random.Random(3))
    plans.update(**step.metadata, mm_ranges=step.mm_ranges(model))
    with pytest.raises(fp.InputError, match="q: expected 40 rows.*got 39"):
        plans.attention("layer", step.q[:39], step.cache, torch.empty_like(step.q))
    with pytest.raises(fp.InputError, match="layer: expected one of layer, got 'other'"):
        plans.attention("other", step.q, step.cache, torch.empty_like(step.q))
    with pytest.raises(fp.InputError, match="k: expected page_size = 16"):
        plans.attention("layer", step.q, step.cache[:, :, :8], torch.empty_like(step.q))
    with pytest.raises(fp.InputError, match="seqused_k.*expected 0 to 16 keys"):
        shape.plans({"layer": model.mask()}, max_blocks=1).update(**step.metadata)
    with pytest.raises(fp.InputError, match="max_tokens"):
        shape.plans({"layer": model.mask()}, max_tokens=39).update(**step.metadata)


def test_importing_it_imports_no_vllm_and_no_kernels() -> None:
    code = (
        "import sys, fa4_prefixlm.integrations.vllm as own; own.find_build();"
        "print([name for name in ('vllm', 'cutlass', 'flash_attn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_the_build_is_vllms_own_where_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "installed", lambda module: None)
    assert find_build() is None
    monkeypatch.setattr(locate, "installed", lambda module: object() if module == VENDORED else None)
    assert find_build() == VENDORED
    assert VENDORED in locate.MODULES


def on_hopper_with(build: builds.Build | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_ARCH", "sm_90")
    monkeypatch.setattr(locate, "installed", lambda module=None: build)


def test_spans_at_head_dim_512_are_refused_where_the_build_has_no_such_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    upstream = locate.installed(UPSTREAM)
    if upstream is None:
        pytest.skip("flash-attn-4 is not installed")
    shape = Shape(head_dim=512, dtype=torch.bfloat16, device="cuda")
    on_hopper_with(upstream, monkeypatch)
    with FakeTensorMode():
        with pytest.raises(fp.UnsupportedError, match=r"layers\['first'\].*FlashAttention-4 runs here.*256"):
            shape.plans({"first": layer_mask(64, clamp=True)})
        shape.plans({"first": layer_mask(64, clamp=True)}, head_dim=256)


def test_head_dim_512_runs_on_a_build_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    upstream = locate.installed(UPSTREAM)
    if upstream is None:
        pytest.skip("flash-attn-4 is not installed")
    shape = Shape(head_dim=512, dtype=torch.bfloat16, device="cuda")
    wide = dataclasses.replace(upstream.head_dims, sm90_pairs=frozenset({(512, 512)}))
    on_hopper_with(dataclasses.replace(upstream, head_dims=wide), monkeypatch)
    with FakeTensorMode():
        plans = shape.plans({"global": layer_mask(None, clamp=True, prefix_lm=False)})
        spans = shape.plans({"global": layer_mask(None, clamp=True)})
    own, (with_spans,) = plans.plans[causal], spans.plans.values()
    assert (own.choice.name, own.in_place) == ("causal", True)
    assert (with_spans.choice.name, with_spans.in_place) == ("two_pass", True)
