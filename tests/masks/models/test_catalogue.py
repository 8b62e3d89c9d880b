"""The masks of the families: interval by interval, against each other, vLLM's rule and plain loops."""

from __future__ import annotations

import functools
import pathlib
import random
from collections.abc import Callable, Sequence

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks import causal
from fa4_prefixlm.masks.models import bagel, gemma3, gemma4, molmo2, moondream3, paligemma, rswa, streaming, t5
from fa4_prefixlm.masks.models.catalogue import CATALOGUE, Example
from fa4_prefixlm.masks.spans import drop_longer, runs_of
from tests.masks.models.token_types import random_types
from tests.masks.planned import visible_by_bounds

DOCS = pathlib.Path(__file__).parents[3] / "docs"
WINDOW = 5


@pytest.mark.parametrize("name", CATALOGUE)
def test_intervals_are_the_dense_mask(name: str) -> None:
    example = CATALOGUE[name]
    for rows in (example.seqlen, 13, 1):
        got = visible_by_bounds(example.mask, example.ranges, example.seqlen, rows)
        wanted = example.mask.dense(seqlen=example.seqlen, ranges=example.ranges, seqlen_q=rows)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if CATALOGUE[name].mask.names])
def test_intervals_are_the_dense_mask_for_random_spans(name: str) -> None:
    mask, rng = CATALOGUE[name].mask, random.Random(2)
    for _ in range(10):
        keys = rng.randint(2, 50)
        spans = {own: runs_of(torch.tensor([random_types(rng, keys, (0, 1))]), {1})[0] for own in sorted(mask.names)}
        spans[sorted(mask.names)[0]] = spans[sorted(mask.names)[0]] or [(0, 1)]  # a plan refuses an empty mask
        rows = rng.randint(1, keys)
        wanted = mask.dense(seqlen=keys, ranges=spans, seqlen_q=rows)
        assert torch.equal(visible_by_bounds(mask, spans, keys, rows), wanted)


def test_every_example_shows_its_rule() -> None:
    for name, example in CATALOGUE.items():
        assert isinstance(example, Example)
        assert 48 <= example.seqlen <= 64
        if example.mask.names:
            without = None if not isinstance(example.ranges, dict) else dict.fromkeys(example.ranges, ())
            with_spans = example.mask.dense(seqlen=example.seqlen, ranges=example.ranges)
            assert not torch.equal(with_spans, example.mask.dense(seqlen=example.seqlen, ranges=without)), name


def test_one_interval_a_row_where_the_docs_say_so() -> None:
    """What decides the speed: K, and tags."""
    intervals = {}
    for name, example in CATALOGUE.items():
        ranges = example.ranges
        named = ranges if isinstance(ranges, dict) else dict.fromkeys(example.mask.names, ranges)
        intervals[name] = example.mask.count({own: len(pairs) for own, pairs in named.items()})
    assert intervals.pop("molmo2-transformers") == 6
    gaps = ("paligemma-global-gaps", "paligemma2-local-gaps", "hrm-text-gaps")
    assert [intervals.pop(name) for name in gaps] == [4] * len(gaps)
    two = ("rswa", "sinks", "bd3lm", "teacher-forcing", "shared-prompt")
    assert [intervals.pop(name) for name in two] == [2] * len(two)
    # By the formula; what rows of a batch really see is counted where it is above 4.
    assert [intervals.pop(f"t5gemma2-merged-{layers}") for layers in ("global", "local")] == [3, 3]
    assert intervals.pop("pi0-expert-padding") == 3
    assert intervals.pop("prefix-tree") == 4
    assert intervals.pop("bagel-training") == 5
    assert set(intervals.values()) == {1}


IMAGES = [(3, 15), (20, 24)]
DIFFERENT = {
    "gemma3 local": (
        gemma3.local_layers(WINDOW, like="transformers"),
        gemma3.local_layers(WINDOW, like="vllm"),
    ),
    "gemma4 unified local": (
        gemma4.unified_local_layers(WINDOW, like="transformers-static-cache"),
        gemma4.unified_local_layers(WINDOW, like="transformers-forward"),
    ),
    "molmo2": (molmo2.all_layers(like="transformers"), molmo2.all_layers(like="vllm")),
    "paligemma gaps": (
        paligemma.global_layers(like="transformers"),
        paligemma.global_layers(like="transformers", gaps=True),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_variants_differ(name: str) -> None:
    one, other = (mask.dense(seqlen=30, ranges=IMAGES) for mask in DIFFERENT[name])
    assert not torch.equal(one, other)


def test_local_variants_agree_on_short_spans() -> None:
    """A span within the window: clipped or whole, the same; and vLLM drops none of them."""
    spans = [[(3, 8), (20, 24)]]
    assert drop_longer(spans, WINDOW) == spans
    one, other = DIFFERENT["gemma3 local"]
    wanted = one.dense(seqlen=30, ranges=spans[0])
    assert torch.equal(wanted, other.dense(seqlen=30, ranges=spans[0]))


def test_global_variants_of_gemma4_unified_differ() -> None:
    plain = gemma4.unified_global_layers(like="transformers-static-cache")
    joined = gemma4.unified_global_layers(like="transformers-forward")
    assert plain == causal
    assert not torch.equal(plain.dense(seqlen=30), joined.dense(seqlen=30, ranges=IMAGES))


def test_vllm_and_transformers_agree_on_gemma4() -> None:
    assert gemma4.global_layers() == gemma4.global_layers(like="transformers") == gemma4.global_layers(like="vllm")
    assert gemma4.global_layers() == gemma4.unified_global_layers(like="vllm") == causal
    local = gemma4.local_layers(WINDOW)
    assert local == gemma4.local_layers(WINDOW, like="transformers") == gemma4.local_layers(WINDOW, like="vllm")
    assert local == gemma4.unified_local_layers(WINDOW, like="transformers-static-cache")
    assert local == gemma4.unified_local_layers(WINDOW, like="vllm")


def vllm_mask(
    spans: Sequence[tuple[int, int]], layer_window: int | None, clamp: bool, model_window: int | None
) -> torch.Tensor:
    """The rule of vLLM 0.33.0 in plain Python: `compute_mm_prefix_ranges` and `fill_mm_prefix_query_ranges` of
    `v1/attention/backends/utils.py`, then `mm_prefix_mask_mod` of `v1/attention/backends/flash_attn.py`. Their ranges
    include the end.

    clamp: `mm_prefix_clamp_sliding_window`, of the model (what is dropped) and of its sliding layers (what is clipped).
    """
    ranges = [(start, end - 1) for start, end in spans]
    ranges = [(s, e) for s, e in ranges if clamp or model_window is None or e - s + 1 <= model_window]
    visible = torch.zeros(30, 30, dtype=torch.bool)
    for q in range(30):
        first, last = next(((s, e) for s, e in ranges if s < e and s <= q <= e), (-1, -1))
        for kv in range(30):
            near = layer_window is None or q - kv < layer_window
            joined = first <= kv <= last and (near or not clamp)
            visible[q, kv] = (kv <= q and near) or joined
    return visible


def test_vllm_by_its_own_rule() -> None:
    image = [(3, 15), (15, 19), (20, 21), (24, 29)]
    kept = drop_longer([image], WINDOW)[0]
    assert len(kept) == 3
    for mask, spans, layer_window, clamp, model_window in (
        (gemma3.global_layers(), kept, None, False, WINDOW),
        (gemma3.local_layers(WINDOW, like="vllm"), kept, WINDOW, False, WINDOW),
        (gemma4.local_layers(WINDOW, like="vllm"), image, WINDOW, True, WINDOW),
        (gemma4.unified_local_layers(WINDOW, like="vllm"), image, WINDOW, True, WINDOW),
        (paligemma.global_layers(like="vllm"), image, None, False, None),  # PaliGemma 1
        (paligemma.global_layers(like="vllm"), kept, None, False, WINDOW),  # PaliGemma 2
        (paligemma.local_layers(WINDOW, like="vllm"), kept, WINDOW, False, WINDOW),
        (molmo2.all_layers(like="vllm"), image, None, False, None),
    ):
        wanted = vllm_mask(image, layer_window, clamp, model_window)
        assert torch.equal(mask.dense(seqlen=30, ranges=spans), wanted), mask
    # Gemma 4 takes the ranges of its global layers away.
    assert torch.equal(gemma4.global_layers(like="vllm").dense(seqlen=30), vllm_mask([], None, True, WINDOW))


def test_vllm_drops_long_spans() -> None:
    kept = drop_longer([IMAGES, [], [(0, 5), (5, 11)]], WINDOW)
    assert kept == [[(20, 24)], [], [(0, 5)]]
    mask = gemma3.global_layers()
    assert not torch.equal(mask.dense(seqlen=30, ranges=IMAGES), mask.dense(seqlen=30, ranges=kept[0]))
    with pytest.raises(InputError, match="window: expected a positive number of tokens, got 0"):
        drop_longer([IMAGES], 0)


LIKES: dict[str, tuple[Callable[..., fp.Mask], str]] = {
    "gemma3": (functools.partial(gemma3.local_layers, WINDOW), "'transformers' or 'vllm'"),
    "gemma4 global": (gemma4.global_layers, "'transformers' or 'vllm'"),
    "gemma4 local": (functools.partial(gemma4.local_layers, WINDOW), "'transformers' or 'vllm'"),
    "unified global": (
        gemma4.unified_global_layers,
        "'transformers-forward' or 'transformers-static-cache' or 'vllm'",
    ),
    "unified local": (
        functools.partial(gemma4.unified_local_layers, WINDOW),
        "'transformers-forward' or 'transformers-static-cache' or 'vllm'",
    ),
    "paligemma global": (paligemma.global_layers, "'transformers' or 'vllm'"),
    "paligemma local": (functools.partial(paligemma.local_layers, WINDOW), "'transformers' or 'vllm'"),
    "molmo2": (molmo2.all_layers, "'transformers' or 'vllm'"),
}


@pytest.mark.parametrize("name", LIKES)
def test_like_has_no_default_where_it_matters_and_is_checked(name: str) -> None:
    factory, choices = LIKES[name]
    if name not in ("gemma4 global", "gemma4 local"):  # one mask
        with pytest.raises(TypeError, match="like"):
            factory()
    for wrong in ("hf", None, "Transformers", ["vllm"]):
        with pytest.raises(InputError) as caught:
            factory(like=wrong)
        assert str(caught.value) == f"like: expected the program to agree with: {choices}, got {wrong!r}"


def test_two_transformers_rules_have_no_common_name() -> None:
    for factory in (gemma4.unified_global_layers, functools.partial(gemma4.unified_local_layers, WINDOW)):
        with pytest.raises(InputError, match="like: "):
            factory(like="transformers")


def test_windows_are_checked() -> None:
    for factory in (
        functools.partial(gemma3.local_layers, like="vllm"),
        gemma4.local_layers,
        functools.partial(paligemma.local_layers, like="transformers"),
        rswa.all_layers,
    ):
        with pytest.raises(InputError, match="window: "):
            factory(0)


def test_spans_of_the_families() -> None:
    types = torch.tensor([[0, 1, 1, 2, 2, 3, 1, 0]])
    assert gemma3.spans_from_token_types(types) == [[(1, 3), (6, 7)]]
    assert gemma4.spans_from_token_types(types) == [[(1, 5), (6, 7)]]
    assert molmo2.spans_from_token_types(types) == [[(1, 3), (6, 7)]]
    assert t5.spans_from_lengths([5, 0, 9]) == [[(0, 5)], [], [(0, 9)]]
    with pytest.raises(InputError, match=r"input_lengths\[1\]: expected a number of tokens, got -1"):
        t5.spans_from_lengths([5, -1])
    assert moondream3.IMAGE_SPAN == (0, 1 + 27 * 27)


def test_rules_by_a_loop() -> None:
    """The families without an oracle, by their rule in plain Python."""
    joined = [(2, 9), (9, 12)]

    def same(p: int, kv: int, spans: list[tuple[int, int]]) -> bool:
        return any(start <= p < end and start <= kv < end for start, end in spans)

    wanted = torch.tensor([[kv <= p or same(p, kv, joined) for kv in range(20)] for p in range(20)])
    for mask in (moondream3.all_layers(), bagel.all_layers(), t5.prefix_lm()):
        assert torch.equal(mask.dense(seqlen=20, ranges=joined), wanted)
    wanted = torch.tensor([[kv <= p and (kv < 7 or p - kv < WINDOW) for kv in range(20)] for p in range(20)])
    assert torch.equal(rswa.all_layers(WINDOW).dense(seqlen=20, ranges=[(0, 7)]), wanted)


def test_sinks_by_a_loop() -> None:
    wanted = torch.tensor([[kv <= p and (kv < 4 or p - kv < WINDOW) for kv in range(20)] for p in range(20)])
    assert torch.equal(streaming.all_layers(WINDOW).dense(seqlen=20, ranges=streaming.sinks(1, 4)[0]), wanted)


def test_bagel_in_training_by_a_loop() -> None:
    """Splits as BAGEL's data has them: text is causal, an image sees itself, noise is seen by its own split alone."""
    rng = random.Random(6)
    for _ in range(40):
        splits = [(rng.choice(["causal", "full", "noise"]), rng.randint(1, 6)) for _ in range(rng.randint(1, 9))]
        of_token = [index for index, (_, tokens) in enumerate(splits) for _ in range(tokens)]
        keys = len(of_token)

        def sees(p: int, kv: int, splits=splits, of_token=of_token) -> bool:
            own, other = of_token[p], of_token[kv]
            if splits[other][0] == "noise":
                return own == other
            return kv <= p or (own == other and splits[own][0] == "full")

        wanted = torch.tensor([[sees(p, kv) for kv in range(keys)] for p in range(keys)])
        starts = [of_token.index(index) for index in range(len(splits))]
        spans = {
            name: [
                (start, start + tokens) for start, (kind, tokens) in zip(starts, splits, strict=True) if kind == mode
            ]
            for name, mode in (("image", "full"), ("noised", "noise"))
        }
        assert torch.equal(bagel.training_layers().dense(seqlen=keys, ranges=spans), wanted)
        assert torch.equal(visible_by_bounds(bagel.training_layers(), spans, keys, keys), wanted)


def test_every_entry_is_in_the_docs() -> None:
    page = (DOCS / "catalogue.md").read_text()
    for name in CATALOGUE:
        assert f"](pictures/catalogue/{name}.png)" in page
    shown = {path.stem for path in (DOCS / "pictures" / "catalogue").glob("*.png")}
    assert shown == set(CATALOGUE)
