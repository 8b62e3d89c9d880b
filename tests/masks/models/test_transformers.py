"""The masks of the families against transformers' own models."""

from __future__ import annotations

import functools
import importlib
import itertools
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.masks import causal, one_block
from fa4_prefixlm.masks.models import gemma3, gemma4, molmo2, paligemma, rswa
from fa4_prefixlm.masks.packing import in_documents
from fa4_prefixlm.masks.spans import BatchSpans, runs_of
from tests.masks.models.token_types import random_types

WINDOW = 5
CASES = 8  # batches of three rows


@pytest.fixture
def oracles() -> ModuleType:
    """oracles.py beside this file; skips where transformers is not installed."""
    return importlib.import_module("tests.masks.models.oracles")


@pytest.fixture
def oracles_5_24(oracles: ModuleType) -> ModuleType:
    """The same; skips what an older transformers does not have or do."""
    if not oracles.SINCE_5_24:
        pytest.skip("in transformers since 5.24")
    return oracles


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
