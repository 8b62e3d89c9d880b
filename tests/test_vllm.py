"""vLLM's metadata to plans: vLLM's mask pair by pair, padded and windowed batches as vLLM has them, errors.

The GPU part runs each FA4 there is, against fp64 and against the call that vLLM makes.
"""

from __future__ import annotations

import dataclasses
import functools
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
    GroupPlans,
    find_build,
    layer_mask,
    spans_from_mm_ranges,
    split_cache,
)
from fa4_prefixlm.masks import causal, window
from fa4_prefixlm.testing.accuracy import exact_attention, relative_error

UPSTREAM = "flash_attn.cute"
NULL_BLOCK = 0


@dataclasses.dataclass(frozen=True)
class Model:
    """A layer of a model in vLLM. clamp: the model's and the layer's `mm_prefix_clamp_sliding_window`."""

    window: int | None  # the layer's
    model_window: int | None
    clamp: bool = False
    prefix_lm: bool = True

    def mask(self) -> fp.Mask:
        return layer_mask(self.window, clamp=self.clamp, prefix_lm=self.prefix_lm)


MODELS = {
    "gemma3 local": Model(24, 24),
    "gemma3 global": Model(None, 24),
    "gemma4 local": Model(24, 24, clamp=True),
    "gemma4 global": Model(None, 24, clamp=True, prefix_lm=False),
    "paligemma": Model(None, None),
    "a window of one token": Model(1, 1, clamp=True),
    "text model": Model(24, 24, prefix_lm=False),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """`rows` tokens of this step after `context` ones. ranges: inclusive, of all of the prompt."""

    context: int
    rows: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def keys(self) -> int:
        return self.context + self.rows

    @property
    def decoding(self) -> bool:
        """Past the prompt: only there may the host's lengths be too large."""
        return self.rows == 1 and all(end < self.context for _, end in self.ranges)

    def kept(self, model: Model) -> list[tuple[int, int]]:
        """The ranges that vLLM's runner makes for the model."""
        longest = None if model.clamp else model.model_window
        return [own for own in self.ranges if longest is None or own[1] - own[0] + 1 <= longest]

    def spans(self, model: Model) -> tuple[tuple[int, int], ...]:
        """The same, half-open, of more than one token."""
        return tuple((start, end + 1) for start, end in self.kept(model) if start < end)


def random_request(rng: random.Random, longest: int = 120) -> Request:
    ranges, at = [], rng.randint(0, 4)
    while at < longest:
        tokens = rng.choice([1, 2, 8, 23, 24, 25, 40])
        ranges.append((at, at + tokens - 1))
        at += tokens + rng.choice([0, 0, 1, 5, 30])
    prompt = ranges[-1][1] + 1 + rng.randint(0, 10)
    if rng.random() < 0.3:  # decoding
        return Request(prompt + rng.randint(0, 20), 1, tuple(ranges))
    cuts = [0, *(end for end in range(1, prompt) if not any(start < end <= stop for start, stop in ranges)), prompt]
    end = rng.choice(cuts[1:])
    context = rng.randint(0, end - 1)  # a hit in the prefix cache may end inside of an image
    return Request(context, end - context, tuple(rng.sample(ranges, len(ranges))))


def sees(p: int, kv: int, ranges: list[tuple[int, int]], model: Model) -> bool:
    """`v1/attention/backends/flash_attn.py`, pair by pair: the query's own range, (-1, -1) outside of all."""
    in_window = model.window is None or p - kv < model.window
    start, end = next(((s, e) for s, e in ranges if s < e and s <= p <= e and model.prefix_lm), (-1, -1))
    in_range = start <= kv <= end and (in_window or not model.clamp)
    return (kv <= p and in_window) or in_range


def brute_mask(request: Request, model: Model) -> torch.Tensor:
    ranges = request.kept(model)
    rows = range(request.context, request.keys)
    return torch.tensor([[sees(p, kv, ranges, model) for kv in range(request.keys)] for p in rows])


def starts_of(requests: list[Request]) -> list[int]:
    starts = [0]
    for request in requests:
        starts.append(starts[-1] + request.rows)
    return starts


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


@dataclasses.dataclass
class Step:
    """One batch in vLLM's form: a padded batch, a wide block table, the cache of one layer, and what it holds.

    k, v: packed, all keys of each request. cache: `(blocks, kv_heads, block_size, 2 * head_dim)`, tokens outermost.
    """

    requests: list[Request]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache: torch.Tensor
    metadata: dict[str, object]

    @property
    def total(self) -> int:
        return sum(request.rows for request in self.requests)

    @classmethod
    def of(cls, requests: list[Request], shape: Shape, model_window: int | None, rng: random.Random) -> Step:
        generator = torch.Generator(shape.device).manual_seed(rng.randint(0, 2**30))

        def normal(rows: int, heads: int) -> torch.Tensor:
            size = (rows, heads, shape.head_dim)
            return torch.randn(size, generator=generator, device=shape.device, dtype=torch.float32).to(shape.dtype)

        total, keys = sum(request.rows for request in requests), sum(request.keys for request in requests)
        padded, extra = rng.randint(0, 5), rng.randint(0, 2)
        q, k, v = normal(total + padded, shape.heads[0]), normal(keys, shape.heads[1]), normal(keys, shape.heads[1])
        counts = [-(-request.keys // shape.block_size) for request in requests]
        blocks = rng.sample(range(1, sum(counts) + 9), sum(counts))  # block 0 is vLLM's null block
        cache = torch.full((sum(counts) + 9, shape.block_size, shape.heads[1], 2 * shape.head_dim), 999.0)
        cache = cache.to(device=shape.device, dtype=shape.dtype)
        wide = torch.full((len(requests) + extra, shape.max_blocks + 7), NULL_BLOCK, dtype=torch.int32)
        row = 0
        for index, (request, count) in enumerate(zip(requests, counts, strict=True)):
            own, blocks = blocks[:count], blocks[count:]
            table = torch.tensor(own, dtype=torch.long)
            held = torch.zeros(count * shape.block_size, *cache.shape[2:]).to(cache)
            held[: request.keys] = torch.cat([k, v], dim=2)[row : row + request.keys]
            cache[table.to(shape.device)] = held.unflatten(0, (count, shape.block_size))
            if model_window is not None:  # blocks that slid out of every row's window
                table[: max(0, request.context - model_window + 1) // shape.block_size] = NULL_BLOCK
            wide[index, :count] = table
            row += request.keys
        starts = starts_of(requests) + [total] * extra
        seq_lens = [request.keys for request in requests] + [0] * extra
        starts_cpu, seq_lens_cpu = (torch.tensor(values, dtype=torch.int32) for values in (starts, seq_lens))
        metadata = {
            "query_start_loc": starts_cpu.to(shape.device),
            "seq_lens": seq_lens_cpu.to(shape.device),
            "block_table": wide.to(shape.device)[:, : shape.max_blocks + 3],
            "query_start_loc_cpu": starts_cpu,
            # With speculative decoding and asynchronous scheduling, the host's lengths are upper bounds there.
            "seq_lens_cpu": seq_lens_cpu + torch.tensor([2 * own.decoding for own in requests] + [0] * extra),
        }
        return cls(requests, q, k, v, cache.transpose(1, 2), metadata)

    def mm_ranges(self, model: Model) -> dict[int, list[tuple[int, int]]]:
        return {index: request.kept(model) for index, request in enumerate(self.requests)}

    def exact(self, model: Model, options: object = None) -> torch.Tensor:
        seqlens = tuple(request.rows for request in self.requests), tuple(request.keys for request in self.requests)
        mask = model.mask()
        spans = tuple(request.spans(model) for request in self.requests) if mask.names else None
        return exact_attention(
            self.q[: self.total], self.k, self.v, mask=mask, spans=spans, seqlens=seqlens, options=options
        )[0]


@dataclasses.dataclass(frozen=True)
class Shape:
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    block_size: int = 16
    max_blocks: int = 14
    max_tokens: int = 700
    max_requests: int = 8
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def plans(self, layers: dict[str, fp.Mask], build: str | None = None, **changed: int) -> GroupPlans:
        sizes = {
            "max_tokens": self.max_tokens,
            "max_requests": self.max_requests,
            "max_blocks": self.max_blocks,
            "block_size": self.block_size,
            "num_heads": self.heads[0],
            "num_kv_heads": self.heads[1],
            "head_dim": self.head_dim,
        }
        return GroupPlans(layers, dtype=self.dtype, device=self.device, build=build, **{**sizes, **changed})


def run_layer(plans: GroupPlans, layer: str, step: Step, **options: object) -> torch.Tensor:
    out = torch.full_like(step.q, 7.0)
    assert plans.attention(layer, step.q, step.cache, out, **options) is out
    assert (out[step.total :] == 7.0).all(), "rows past the batch were written"
    return out[: step.total]


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


# On a GPU.

GPU = Shape((8, 4), 256, 16, 256, 12000, 16, torch.bfloat16, "cuda")
GEMMA3 = {"local": Model(1024, 1024), "global": Model(None, 1024)}
GEMMA4 = {"local": Model(1024, 1024, clamp=True)}
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
            direct = relative_error(vllm_call(step, model, build), exact)
            error = relative_error(run_layer(plans, name, step), exact)
            own = f"vLLM layers on {build}"
            gpu_report(backend=own, kind=f"{kind}, {name}", mask=str(model.mask()), seed=seed, error=error, band=direct)
            assert direct < 3e-3, f"{name}: the peer itself is off, {direct}"
            assert error <= BAND * direct + 1e-6, f"{name}, seed {seed}: {error}, vLLM's call {direct}"


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
        error = relative_error(run_layer(plans, "global", step), step.exact(model))
        assert [own.choice.name for own in plans.plans.values()] == [backend]
        assert error < 3e-3


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
        assert relative_error(out[: step.total], step.exact(GEMMA3["local"])) < 3e-3


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
    plans.update(**steps[0].metadata)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plans.attention("local", q, cache, out)
    for index, step in enumerate(steps):
        ranges = {} if index == 0 else step.mm_ranges(model)
        plans.update(**step.metadata, mm_ranges=ranges)
        q[: len(step.q)] = step.q
        cache[: len(step.cache)] = step.cache
        graph.replay()
        wanted = Model(1024, 1024, prefix_lm=False) if index == 0 else model
        assert relative_error(out[: step.total], step.exact(wanted)) < 3e-3
