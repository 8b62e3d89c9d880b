"""Encoders, policies and canvases against transformers' own models, 5.24 and later."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.masks import everything
from fa4_prefixlm.masks.models import diffusion_gemma, embedding_gemma, hrm_text, modernbert, pi0, t5gemma
from fa4_prefixlm.masks.spans import runs_of
from tests.masks.models.token_types import random_types
from tests.masks.planned import visible_by_bounds

pytestmark = pytest.mark.slow

CASES = 12
LAYERS = ("global", "local")
WINDOWS = (1, 2, 3, 4, 5, 8, 9, 64)


@pytest.fixture
def oracles() -> ModuleType:
    """oracles_5_24.py beside this file; skips where transformers is not installed, or older."""
    return importlib.import_module("tests.masks.models.oracles_5_24")


def paddings(seed: int, least: int = 1) -> Iterator[tuple[random.Random, torch.Tensor]]:
    """Bool `(2, keys)`: real tokens; padding on the left, on the right, inside, or none."""
    rng = random.Random(seed)
    for index in range(CASES):
        keys = rng.randint(least, 30)
        padding = torch.ones(2, keys, dtype=torch.bool)
        if index % 4 == 1:
            padding[1, : rng.randint(0, keys - 1)] = False
        elif index % 4 == 2:
            padding[1, rng.randint(1, keys) :] = False
        elif index % 4 == 3:
            padding[1] = torch.tensor(random_types(rng, keys, (0, 1))).bool()
            padding[1, rng.randrange(keys)] = True
        yield rng, padding


def check(mask: fp.Mask, ranges: dict[str, list] | None, wanted: torch.Tensor, hidden: torch.Tensor | None) -> None:
    """The mask of each row, by pairs and by intervals. hidden: bool `(2, keys)` padding that the mask does not know."""
    for row, expected in enumerate(wanted):
        own = None if not ranges else {name: ranges[name][row] for name in sorted(mask.names)}
        rows, keys = expected.shape
        for got in (mask.dense(seqlen=keys, seqlen_q=rows, ranges=own), visible_by_bounds(mask, own, keys, rows)):
            got = got if hidden is None else got & hidden[row]
            assert torch.equal(got, expected), f"{mask}, {ranges}"


@pytest.mark.parametrize("layer", LAYERS)
def test_modernbert(oracles: ModuleType, layer: str) -> None:
    for rng, padding in paddings(1):
        number = rng.choice(WINDOWS)
        mask = modernbert.global_layers() if layer == "global" else modernbert.local_layers(number)
        check(mask, None, oracles.modernbert(padding, layer=layer, local_attention=number), padding)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_embedding_gemma(oracles: ModuleType, layer: str, version: int) -> None:
    for rng, padding in paddings(2):
        number = rng.choice(WINDOWS)
        mask = embedding_gemma.global_layers()
        if layer == "local":
            mask = embedding_gemma.local_layers(number, version=version)  # type: ignore[arg-type]
        wanted = oracles.embedding_gemma(padding, layer=layer, sliding_window=number, version=version)
        check(mask, None, wanted, padding)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_encoders_of_t5gemma(oracles: ModuleType, layer: str, version: int) -> None:
    for rng, padding in paddings(3):
        number = rng.choice(WINDOWS)
        mask = t5gemma.encoder_global_layers()
        if layer == "local":
            mask = t5gemma.encoder_local_layers(number, version=version)  # type: ignore[arg-type]
        oracle = oracles.t5gemma if version == 1 else oracles.t5gemma2
        check(mask, None, oracle(padding, 3, part="encoder", layer=layer, sliding_window=number), padding)


@pytest.mark.parametrize("layer", LAYERS)
def test_decoder_of_t5gemma(oracles: ModuleType, layer: str) -> None:
    for rng, padding in paddings(4):
        number, rows = rng.choice(WINDOWS), rng.randint(1, 20)
        mask = t5gemma.decoder_global_layers() if layer == "global" else t5gemma.decoder_local_layers(number)
        given = {"layer": layer, "sliding_window": number}
        check(mask, None, oracles.t5gemma(padding, rows, part="decoder", **given), None)
        cross = oracles.t5gemma(padding, rows, part="cross", **given)
        for row, expected in enumerate(cross):
            assert torch.equal(everything.dense(seqlen=padding.shape[1], seqlen_q=rows) & padding[row], expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_merged_attention_of_t5gemma2(oracles: ModuleType, layer: str) -> None:
    """Keys are [encoder | decoder] here and the other way round there."""
    for rng, padding in paddings(5):
        number, rows, keys = rng.choice(WINDOWS), rng.randint(1, 20), padding.shape[1]
        mask = t5gemma.merged_global_layers() if layer == "global" else t5gemma.merged_local_layers(number)
        wanted = oracles.t5gemma2(padding, rows, part="merged", layer=layer, sliding_window=number)
        wanted = torch.cat([wanted[:, :, rows:], wanted[:, :, :rows]], dim=2)
        ranges = {"encoder": runs_of(padding, {1}), "decoder": [[(keys, keys + rows)]] * 2}
        if padding.all():
            assert ranges == t5gemma.merged_ranges([keys] * 2, [rows] * 2)
        check(mask, ranges, wanted, None)


@pytest.mark.parametrize("layer", LAYERS)
def test_canvas_of_diffusion_gemma(oracles: ModuleType, layer: str) -> None:
    for rng, padding in paddings(6):
        window, rows, keys = rng.choice(WINDOWS[1:]), rng.randint(1, 12), padding.shape[1]
        wanted = oracles.canvas(padding, rows, layer=layer, window=window)
        seen = oracles.canvas_keys(keys, rows, layer=layer, window=window)
        canvas = [[(keys, keys + rows)]] * 2
        if layer == "local":
            mask, ranges = diffusion_gemma.canvas_local_layers(window), {"canvas": canvas}
            assert seen == min(keys, window - 1) + rows
        else:
            mask, ranges = diffusion_gemma.canvas_global_layers(), {}
            assert seen == keys + rows
        check(mask, ranges, wanted, torch.nn.functional.pad(padding, (0, rows), value=True))


@pytest.mark.parametrize("canvas", [False, True])
@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_encoder_of_diffusion_gemma(oracles: ModuleType, layer: str, generate: bool, canvas: bool) -> None:
    rng = random.Random(7)
    like = "transformers-generate" if generate else "transformers-forward"
    for _ in range(CASES):
        window, keys = rng.choice(WINDOWS[1:]), rng.randint(2, 30)
        types = torch.tensor([random_types(rng, keys, (0, 1, 2, 3)) for _ in range(2)])
        mask = diffusion_gemma.encoder_global_layers(like=like, canvas=canvas)  # type: ignore[arg-type]
        if layer == "local":
            mask = diffusion_gemma.encoder_local_layers(window, like=like, canvas=canvas)  # type: ignore[arg-type]
        spans = diffusion_gemma.spans_from_token_types(types)
        wanted = oracles.diffusion_encoder(types, layer=layer, window=window, generate=generate)
        check(mask, {"image": spans, "canvas": [[], []]}, wanted, None)


def test_encoding_and_denoising_in_one_batch(oracles: ModuleType) -> None:
    """A sequence with images and one with a canvas, each as alone."""
    for rng, padding in paddings(8):
        window, rows, keys = rng.choice(WINDOWS[1:]), rng.randint(1, 12), padding.shape[1]
        mask = diffusion_gemma.encoder_local_layers(window, like="transformers-generate", canvas=True)
        own = mask.dense(seqlen=keys + rows, seqlen_q=rows, ranges={"image": [], "canvas": [(keys, keys + rows)]})
        whole = torch.ones_like(padding)
        assert torch.equal(own, oracles.canvas(whole, rows, layer="local", window=window)[0])


@pytest.mark.parametrize("gaps", [False, True])
def test_hrm_text(oracles: ModuleType, gaps: bool) -> None:
    for rng, padding in paddings(9):
        keys = padding.shape[1]
        if gaps:
            types = torch.tensor([random_types(rng, keys, (0, 1)) for _ in range(2)])
        else:
            lengths = torch.tensor([[rng.randint(0, keys)] for _ in range(2)])
            types = (torch.arange(keys) < lengths).long()
        ranges = {"prefix": hrm_text.spans_from_token_types(types, gaps=gaps)}
        check(hrm_text.all_layers(gaps=gaps), ranges, oracles.hrm_text(types, padding), padding)


@pytest.mark.parametrize("expert", [False, True])
def test_pi0(oracles: ModuleType, expert: bool) -> None:
    for rng, padding in paddings(10, least=4):
        actions = rng.randint(1, 9)
        wanted = oracles.pi0(padding, actions, expert=expert)
        if expert:
            check(pi0.expert_layers(padding=True), pi0.ranges(padding, actions), wanted, None)
            plain = {"action": pi0.ranges(padding, actions)["action"]}
            hidden = torch.nn.functional.pad(padding, (0, 1 + actions), value=True)
            check(pi0.expert_layers(), plain, wanted, hidden)
        else:
            check(pi0.prefix_layers(padding=True), {"real": runs_of(padding, {1})}, wanted, None)
            check(pi0.prefix_layers(), None, wanted, padding)
