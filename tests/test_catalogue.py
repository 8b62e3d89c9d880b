"""The masks of the families: against transformers' own models, against each other, and interval by interval."""

from __future__ import annotations

import functools
import importlib
import itertools
import pathlib
import random
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks import causal, one_block
from fa4_prefixlm.masks.models import bagel, gemma3, gemma4, molmo2, moondream3, paligemma, rswa, t5
from fa4_prefixlm.masks.models.catalogue import CATALOGUE, Example
from fa4_prefixlm.masks.packing import in_documents
from fa4_prefixlm.masks.spans import BatchSpans, drop_longer, runs_of

DOCS = pathlib.Path(__file__).parent.parent / "docs"
WINDOW = 5
CASES = 8  # batches of three rows


@pytest.fixture
def oracles() -> ModuleType:
    """tests/oracles.py; skips where transformers is not installed."""
    return importlib.import_module("oracles")


@pytest.fixture
def oracles_5_24(oracles: ModuleType) -> ModuleType:
    """The same; skips what an older transformers does not have or do."""
    if not oracles.SINCE_5_24:
        pytest.skip("in transformers since 5.24")
    return oracles


def random_types(rng: random.Random, keys: int, values: tuple[int, ...]) -> list[int]:
    """Runs of 1 to 12 tokens, so that many touch, reach an end of the row or are longer than the window."""
    row: list[int] = []
    while len(row) < keys:
        row += [rng.choice(values)] * rng.choice([1, 2, 3, 6, 12])
    return row[:keys]


def left_padding(rng: random.Random, keys: int) -> torch.Tensor:
    """`(3, keys)` bool: the first row is whole, the others have padding on the left."""
    lengths = [0, rng.randint(1, 3), rng.randint(1, keys - 1)]
    return torch.tensor([[position >= padding for position in range(keys)] for padding in lengths])


def batches(
    values: tuple[int, ...], keys_of: Callable[[random.Random], int] = lambda rng: rng.randint(2, 40)
) -> list[tuple[torch.Tensor, torch.Tensor | None, int]]:
    """(token types `(3, keys)`, padding or None, cached tokens): with neither, padding, a cache, and both."""
    rng = random.Random(sum(values))
    result = []
    for index in range(CASES * 4):
        keys = keys_of(rng)
        types = torch.tensor([random_types(rng, keys, values) for _ in range(3)])
        if index % 8 == 0:
            types[:] = values[1]  # one span over all of the row
        padding = left_padding(rng, keys) if index % 4 in (1, 3) else None
        if padding is not None:
            types[~padding] = 0
        result.append((types, padding, rng.randint(1, keys - 1) if index % 4 >= 2 else 0))
    return result


def dense(
    mask: fp.Mask, spans: BatchSpans | None, keys: int, padding: torch.Tensor | None, cached: int
) -> torch.Tensor:
    """`(3, keys - cached, keys)` bool, without padding keys."""
    rows = [
        mask.dense(seqlen=keys, seqlen_q=keys - cached, ranges=spans[index] if spans is not None else None)
        for index in range(3)
    ]
    result = torch.stack(rows)
    return result if padding is None else result & padding[:, None]


def after_sliding_cache(visible: torch.Tensor, cached: int) -> torch.Tensor:
    """Without the keys that a cache of a sliding layer, which keeps `WINDOW - 1` tokens, has dropped."""
    return visible & (torch.arange(visible.shape[2]) >= max(0, cached - (WINDOW - 1)))


def compare(ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor], values: tuple[int, ...]) -> None:
    for types, padding, cached in batches(values):
        got, wanted = ours(types, padding, cached), theirs(types, padding=padding, cached=cached)
        assert torch.equal(got, wanted), f"types {types.tolist()}, padding {padding}, cached {cached}"


LAYERS = ("global", "local")


def test_the_random_rows_are_varied() -> None:
    types = [own for own, _, _ in batches((0, 1))]
    spans = [runs for own in types for runs in runs_of(own, {1})]
    assert len(types) >= 20
    assert any(len(runs) > 3 for runs in spans)
    assert any(end - start > 2 * WINDOW for runs in spans for start, end in runs)
    assert any(runs and runs[0][0] == 0 for runs in spans)
    assert any(runs and runs[-1][1] == own.shape[1] for own in types for runs in runs_of(own, {1}))


@pytest.mark.parametrize("layer", LAYERS)
def test_gemma3_is_transformers(oracles: ModuleType, layer: str) -> None:
    mask = gemma3.global_layers() if layer == "global" else gemma3.local_layers(WINDOW, like="transformers")

    def ours(types: torch.Tensor, padding: torch.Tensor | None, cached: int) -> torch.Tensor:
        return dense(mask, gemma3.spans_from_token_types(types), types.shape[1], padding, cached)

    compare(ours, functools.partial(oracles.gemma3, layer=layer, window=WINDOW), (0, 1))


@pytest.mark.parametrize("layer", LAYERS)
def test_gemma4_is_transformers(oracles: ModuleType, layer: str) -> None:
    def ours(types: torch.Tensor, padding: torch.Tensor | None, cached: int) -> torch.Tensor:
        spans = gemma4.spans_from_token_types(types)
        if layer == "global":
            return dense(gemma4.global_layers(), None, types.shape[1], padding, cached)
        return dense(gemma4.local_layers(WINDOW), spans, types.shape[1], padding, cached)

    compare(ours, functools.partial(oracles.gemma4, layer=layer, window=WINDOW), (0, 1, 2, 3))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("generate", [False, True])
def test_gemma4_unified_is_transformers(oracles: ModuleType, layer: str, generate: bool) -> None:
    like: Any = "transformers-static-cache" if generate else "transformers-forward"
    local = gemma4.unified_local_layers(WINDOW, like=like)
    mask = gemma4.unified_global_layers(like=like) if layer == "global" else local

    def ours(types: torch.Tensor, padding: torch.Tensor | None, cached: int) -> torch.Tensor:
        spans = gemma4.spans_from_token_types(types) if mask.names else None
        visible = dense(mask, spans, types.shape[1], padding, cached)
        # transformers' sliding cache has no more of a span than this; a mask over all keys does.
        return after_sliding_cache(visible, cached) if layer == "local" and not generate else visible

    compare(
        ours, functools.partial(oracles.gemma4_unified, layer=layer, window=WINDOW, generate=generate), (0, 1, 2, 3)
    )


@pytest.mark.parametrize(("version", "layer"), [(1, "global"), (2, "global"), (2, "local")])
def test_paligemma_is_transformers(oracles: ModuleType, version: int, layer: str) -> None:
    """0s anywhere, so the masks with `gaps=True`; padding is 0 and in the block, as transformers has it."""
    if layer == "local":
        mask = paligemma.local_layers(WINDOW, like="transformers", gaps=True)
    else:
        mask = paligemma.global_layers(like="transformers", gaps=True)

    def ours(types: torch.Tensor, padding: torch.Tensor | None, cached: int) -> torch.Tensor:
        spans = paligemma.spans_from_token_types(types, gaps=True)
        return dense(mask, [[], [], []] if cached else spans, types.shape[1], padding, cached)

    window = WINDOW if version == 2 else None
    compare(ours, functools.partial(oracles.paligemma, version=version, layer=layer, window=window), (1, 0))


@pytest.mark.parametrize(("version", "layer"), [(1, "global"), (2, "global"), (2, "local")])
def test_paligemma_as_its_processor_writes_it(oracles: ModuleType, version: int, layer: str) -> None:
    """One prefix, one suffix, padding of type 0 on either side. Rows that are padding see what they like."""
    if layer == "local":
        mask = paligemma.local_layers(WINDOW, like="transformers")
    else:
        mask = paligemma.global_layers(like="transformers")
    rng = random.Random(1)
    for _ in range(20):
        keys = rng.randint(4, 40)
        types, real = torch.zeros(3, keys, dtype=torch.long), torch.zeros(3, keys, dtype=torch.bool)
        for row in range(3):
            start, suffix, end = sorted(rng.sample(range(keys + 1), 3))
            types[row, suffix:end] = 1
            real[row, start:end] = True
        spans = paligemma.spans_from_token_types(types, attention_mask=real.long())
        assert all(len(own) == 1 for own in spans)
        wanted = oracles.paligemma(
            types, version=version, layer=layer, window=WINDOW if version == 2 else None, padding=real
        )
        assert torch.equal(dense(mask, spans, keys, real, 0)[real], wanted[real])


def test_molmo2_is_transformers(oracles: ModuleType) -> None:
    mask = molmo2.all_layers(like="transformers")

    def ours(types: torch.Tensor, padding: torch.Tensor | None, cached: int) -> torch.Tensor:
        return dense(mask, molmo2.spans_from_token_types(types), types.shape[1], padding, cached)

    compare(ours, oracles.molmo2, (0, 1))


def test_rswa_is_transformers(oracles_5_24: ModuleType) -> None:
    """The prompt in one pass or in chunks, then any number of tokens; padding in the prompt."""
    rng, dropped = random.Random(4), 0
    for index in range(60):
        keys = rng.randint(2, 40)
        prompt, cached = rng.randint(1, keys), rng.randint(0, keys - 1)
        padding = left_padding(rng, keys) if index % 2 else torch.ones(3, keys, dtype=torch.bool)
        padding[:, prompt:] = True
        wanted = oracles_5_24.rswa(keys, prompt=prompt, window=WINDOW, padding=padding, cached=cached)
        # A defect of transformers 5.24: once its cache has dropped tokens, it reads the prompt's padding that many
        # positions later. Where nothing was dropped, that is the padding.
        offset = max(0, cached - prompt - (WINDOW - 1))
        dropped += offset > 0
        read = torch.cat([padding[:, offset : offset + prompt], padding[:, prompt:]], dim=1)
        got = dense(rswa.all_layers(WINDOW), [[(0, prompt)]] * 3, keys, read, cached)
        assert torch.equal(got, wanted), f"prompt {prompt}, cached {cached}, padding {padding}"
    assert dropped > 10


@pytest.mark.parametrize("chunk", [None, 3])
def test_rswa_is_what_generate_runs(oracles_5_24: ModuleType, chunk: int | None) -> None:
    wanted = oracles_5_24.rswa_generate(24, prompt=8, window=WINDOW, chunk=chunk)
    assert torch.equal(rswa.all_layers(WINDOW).dense(seqlen=24, ranges=[(0, 8)]), wanted[0])


def test_rswa_without_a_cache_is_causal_in_transformers(oracles_5_24: ModuleType) -> None:
    wanted = oracles_5_24.rswa_without_cache(24, window=WINDOW)[0]
    assert torch.equal(causal.dense(seqlen=24), wanted)
    assert torch.equal(rswa.all_layers(WINDOW).dense(seqlen=24, ranges=[(0, 24)]), wanted)


Documents = list[tuple[int, int]]


def packed_rows(values: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor, list[Documents]]]:
    """(token types `(3, keys)`, position ids that restart in each document, the documents of each row)."""
    rng = random.Random(5)
    result = []
    for _ in range(CASES * 2):
        keys = rng.randint(4, 40)
        types = torch.tensor([random_types(rng, keys, values) for _ in range(3)])
        borders = [[0, *sorted(rng.sample(range(1, keys), rng.randint(1, 3))), keys] for _ in range(3)]
        documents = [list(itertools.pairwise(own)) for own in borders]
        positions = [[position for start, end in own for position in range(end - start)] for own in documents]
        result.append((types, torch.tensor(positions), documents))
    return result


def cut(spans: Documents, documents: Documents) -> Documents:
    """Spans that end with their document."""
    pieces = [(max(first, start), min(last, end)) for start, end in documents for first, last in spans]
    return [(first, last) for first, last in pieces if first < last]


def dense_packed(mask: fp.Mask, spans: BatchSpans, documents: list[Documents], keys: int) -> torch.Tensor:
    """`(3, keys, keys)` bool."""
    rows = []
    for own, docs in zip(spans, documents, strict=True):
        named = {name: docs if name == "document" else own for name in mask.names}
        rows.append(mask.dense(seqlen=keys, ranges=named))
    return torch.stack(rows)


NEAR = causal & fp.masks.window(WINDOW)
JOINED = {"image": fp.masks.same_span("image"), "block": one_block("image"), "prefix": one_block("prefix")}
PACKED: dict[tuple[str, str], tuple[fp.Mask, fp.Mask, fp.Mask]] = {  # the mask, its causal part, what is joined to it
    ("gemma3", "global"): (gemma3.global_layers(), causal, JOINED["image"]),
    ("gemma4_unified", "global"): (
        gemma4.unified_global_layers(like="transformers-forward"),
        causal,
        JOINED["image"],
    ),
    ("gemma4_unified", "local"): (
        gemma4.unified_local_layers(WINDOW, like="transformers-forward"),
        NEAR,
        JOINED["image"],
    ),
    ("paligemma1", "global"): (paligemma.global_layers(like="transformers", gaps=True), causal, JOINED["prefix"]),
    ("paligemma2", "global"): (paligemma.global_layers(like="transformers", gaps=True), causal, JOINED["prefix"]),
    ("paligemma2", "local"): (paligemma.local_layers(WINDOW, like="transformers", gaps=True), NEAR, JOINED["prefix"]),
    ("molmo2", "global"): (molmo2.all_layers(like="transformers"), causal, JOINED["block"]),
}


def window_of(name: str) -> int | None:
    return None if name in ("molmo2", "paligemma1") else WINDOW


@pytest.mark.parametrize(("name", "layer"), PACKED)
def test_packed_rows_are_transformers(oracles: ModuleType, name: str, layer: str) -> None:
    """Since 5.24 the mask within each document; in 5.23 what a span adds crosses their borders."""
    mask, base, join = PACKED[name, layer]
    assert base | join == mask
    for types, positions, documents in packed_rows((0, 1)):
        keys = types.shape[1]
        wanted = oracles.packed(name, types, positions, layer=layer, window=window_of(name))
        spans = runs_of(types, {0 if name.startswith("paligemma") else 1})
        within = [cut(own, docs) for own, docs in zip(spans, documents, strict=True)]
        if oracles.SINCE_5_24:
            got = dense_packed(in_documents(mask), within, documents, keys)
        else:
            got = dense_packed(in_documents(base) | join, spans, documents, keys)
        assert torch.equal(got, wanted), f"types {types.tolist()}, documents {documents}"


@pytest.mark.parametrize("name", ["paligemma1", "paligemma2"])
def test_packed_prefixes_are_transformers(oracles_5_24: ModuleType, name: str) -> None:
    """Each document with its prefix in one run: the mask without gaps."""
    for types, positions, documents in packed_rows((0, 1)):
        spans = []
        for row, docs in enumerate(documents):
            spans.append([(start, (start + end + 1) // 2) for start, end in docs])
            types[row] = 1
            for start, end in spans[row]:
                types[row, start:end] = 0
        wanted = oracles_5_24.packed(name, types, positions, layer="global", window=window_of(name))
        mask = in_documents(paligemma.global_layers(like="transformers"))
        assert torch.equal(dense_packed(mask, spans, documents, types.shape[1]), wanted)


@pytest.mark.parametrize(("name", "mask"), [("gemma3", gemma3.local_layers), ("gemma4", gemma4.local_layers)])
def test_packed_rows_of_clipped_layers_are_misread_by_transformers(
    oracles: ModuleType, name: str, mask: Callable[..., fp.Mask]
) -> None:
    """A defect of 5.23 and 5.24: where a span is clipped to the window, the token types of every document are read from
    the start of the row. The mask is ours with the spans that this gives.
    """
    local, wrong = in_documents(mask(WINDOW, like="transformers")), 0
    for types, positions, documents in packed_rows((0, 1)):
        spans = runs_of(types, {1})
        read = [
            [(first + start, last + start) for start, end in docs for first, last in cut(own, [(0, end - start)])]
            for own, docs in zip(spans, documents, strict=True)
        ]
        wanted = oracles.packed(name, types, positions, layer="local", window=WINDOW)
        assert torch.equal(dense_packed(local, read, documents, types.shape[1]), wanted)
        right = [cut(own, docs) for own, docs in zip(spans, documents, strict=True)]
        wrong += not torch.equal(dense_packed(local, right, documents, types.shape[1]), wanted)
    assert wrong > CASES


def test_packed_rows_of_gemma4_global_layers_are_causal(oracles: ModuleType) -> None:
    for types, positions, documents in packed_rows((0, 1)):
        wanted = oracles.packed("gemma4", types, positions, layer="global", window=WINDOW)
        got = dense_packed(in_documents(gemma4.global_layers()), [[]] * 3, documents, types.shape[1])
        assert torch.equal(got, wanted)


WITH_SPANS = ("gemma3", "gemma4", "gemma4_unified", "paligemma1", "paligemma2", "molmo2")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
@pytest.mark.parametrize("name", WITH_SPANS)
def test_transformers_refuses_flash_attention(oracles_5_24: ModuleType, name: str, attention: str) -> None:
    """What README says: 5.24 refuses, whether flash attention is installed or not."""
    config = oracles_5_24.configuration(name, window_of(name))
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        oracles_5_24.from_configuration(config, attention)


def test_transformers_refuses_flash_attention_for_pi0(oracles_5_24: ModuleType) -> None:
    """Of the default configuration, which is large: on the meta device, where a model has no memory."""
    config = oracles_5_24.transformers.AutoConfig.for_model("pi0")
    with torch.device("meta"), pytest.raises(ValueError, match="does not support Flash Attention"):
        oracles_5_24.transformers.AutoModel.from_config(config, attn_implementation="flash_attention_4")


@pytest.mark.parametrize("name", WITH_SPANS)
def test_transformers_gives_flash_attention_no_mask(oracles: ModuleType, name: str) -> None:
    """All models of 5.23, and in 5.24 a text model that was asked for by itself: no spans, and no word of it."""
    assert oracles.mask_of_flash_attention(name, torch.tensor([[0, 1, 1, 0]]), window=window_of(name)) is None


def visible_by_bounds(mask: fp.Mask, spans: object, keys: int, rows: int) -> torch.Tensor:
    """The mask of one sequence as a plan has it: from its intervals, and the block beside them."""
    named = {name: [own, []] for name, own in spans.items()} if isinstance(spans, dict) else [spans, []]
    q, k = torch.zeros(2, rows, 1, 8), torch.zeros(2, keys, 1, 8)
    bounds = fp.plan(named if mask.names else None, like=(q, k, k), mask=mask).bounds
    kv = torch.arange(keys)
    visible = ((kv >= bounds.lo[:rows, :, None]) & (kv < bounds.hi[:rows, :, None])).any(1)
    if bounds.tags is not None:
        visible |= bounds.tags.row_tag[:rows, None] == bounds.tags.key_tag[None, :keys]
    return visible


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
    assert [intervals.pop(name) for name in ("paligemma-global-gaps", "paligemma2-local-gaps")] == [4, 4]
    assert intervals.pop("rswa") == 2
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


def test_runs() -> None:
    types = torch.tensor([[0, 1, 1, 2, 0, 1], [0, 0, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2], [3, 1, 2, 1, 1, 3]])
    assert runs_of(types, {1, 2}) == [[(1, 4), (5, 6)], [], [(0, 6)], [(1, 5)]]
    assert runs_of(types, {1, 2}, merge=False) == [
        [(1, 3), (3, 4), (5, 6)],
        [],
        [(0, 6)],
        [(1, 2), (2, 3), (3, 5)],
    ]
    assert runs_of(types, [1]) == [[(1, 3), (5, 6)], [], [], [(1, 2), (3, 5)]]
    assert runs_of(types.to(torch.uint8).T.contiguous().T, {1}) == runs_of(types, {1})
    assert runs_of(torch.zeros(2, 0, dtype=torch.int32), {0}) == [[], []]
    assert runs_of(torch.zeros(0, 4, dtype=torch.int32), {0}) == []


def test_runs_against_a_loop() -> None:
    rng = random.Random(3)
    for merge in (True, False):
        for _ in range(50):
            keys = rng.randint(1, 30)
            row = random_types(rng, keys, (0, 1, 2))
            spans = runs_of(torch.tensor([row]), {1, 2}, merge=merge)[0]
            inside = [any(start <= position < end for start, end in spans) for position in range(keys)]
            assert inside == [kind > 0 for kind in row]
            begins = {start for start, _ in spans}
            for position in range(1, keys):
                if inside[position] and inside[position - 1]:
                    apart = not merge and row[position] != row[position - 1]
                    assert (position in begins) == apart


def test_joined_runs() -> None:
    types = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 0]])
    assert runs_of(types[:2], {0}, joined=True) == [[(0, 2)], []]
    with pytest.raises(InputError, match=r"token_types\[2\]: expected one run of the types \[0\], got the runs"):
        runs_of(types, {0}, joined=True)
    with pytest.raises(InputError, match=r"token_types\[2\]"):
        paligemma.spans_from_token_types(types)
    assert paligemma.spans_from_token_types(types, gaps=True) == [[(0, 2)], [], [(0, 1), (2, 3)]]


@pytest.mark.parametrize(
    ("types", "values", "message"),
    [
        ([[0, 1]], {1}, "token_types: expected an integer tensor"),
        (torch.zeros(1, 4), {1}, "token_types: expected an integer or boolean dtype, got torch.float32"),
        (torch.zeros(4, dtype=torch.long), {1}, r"token_types: expected shape \(batch, seqlen\), got \(4,\)"),
        (torch.zeros(1, 4, dtype=torch.long), (), "values: expected at least one token type"),
    ],
)
def test_wrong_token_types(types: Any, values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runs_of(types, values)


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


@pytest.mark.parametrize(
    "mask", [gemma3.global_layers(), gemma3.local_layers(WINDOW, like="vllm"), causal | one_block("image")], ids=repr
)
def test_documents(mask: fp.Mask) -> None:
    documents, images = [(0, 9), (9, 20), (24, 40)], [(2, 6), (6, 9), (13, 18), (24, 31), (35, 40)]
    wanted = torch.zeros(44, 44, dtype=torch.bool)
    for start, end in documents:
        own = [(first - start, last - start) for first, last in images if start <= first < end]
        wanted[start:end, start:end] = mask.dense(seqlen=end - start, ranges=own)
    packed = in_documents(mask)
    spans = {"image": images, "document": documents}
    assert torch.equal(packed.dense(seqlen=44, ranges=spans), wanted)
    assert torch.equal(visible_by_bounds(packed, spans, 44, 44), wanted)
    assert packed.names == {"image", "document"}


def test_documents_are_checked() -> None:
    with pytest.raises(InputError, match="name: expected a name that"):
        in_documents(causal | one_block("image"), name="image")
    with pytest.raises(InputError, match="mask: expected a mask, got str"):
        in_documents("causal")  # type: ignore[arg-type]
    assert in_documents(causal, name="page").names == {"page"}


def test_every_entry_is_in_the_docs() -> None:
    page = (DOCS / "catalogue.md").read_text()
    for name in CATALOGUE:
        assert f"](pictures/catalogue/{name}.png)" in page
    shown = {path.stem for path in (DOCS / "pictures" / "catalogue").glob("*.png")}
    assert shown == set(CATALOGUE)
