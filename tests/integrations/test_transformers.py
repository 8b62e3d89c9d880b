"""Models of transformers with `attn_implementation="fa4_prefixlm"` against eager attention, float32, on the CPU."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")

import tiny_models  # noqa: E402
from tiny_models import CACHE, NAME, NAMES, WITH_WINDOW, inputs, logits, model, text_model, types_of  # noqa: E402

import fa4_prefixlm as fp  # noqa: E402
import fa4_prefixlm.integrations.transformers as integration  # noqa: E402
from fa4_prefixlm.backends.reference import Dense  # noqa: E402

attention_module = sys.modules["fa4_prefixlm.integrations.transformers.attention"]  # the name is the function
LENGTH = 64
IMAGES = {
    "one": [[(4, 20)], [(30, 37)]],
    "several": [[(2, 9), (12, 25), (40, 52)], [(0, 5), (6, 30)]],
    "none in one row": [[(4, 20)], []],
    "longer than the window": [[(4, 60)], [(0, 64)]],
    "to the end": [[(50, 64)], [(0, 3), (60, 64)]],
}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest logit."""
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each call had that reached a backend of this library."""
    calls: list[int] = []
    run = Dense.run

    def counted(self: Dense, q: torch.Tensor, *arguments: Any) -> Any:
        calls.append(q.shape[0])
        return run(self, q, *arguments)

    monkeypatch.setattr(Dense, "run", counted)
    return calls


def test_names() -> None:
    assert integration.NAME == NAME
    assert "flash" not in NAME
    assert "/" not in NAME


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_prefill(name: str, images: str, runs: list[int]) -> None:
    made = model(name)
    given = inputs(name, types_of(name, IMAGES[images], LENGTH))
    expected = logits(made, "eager", **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logits(made, NAME, **given)
    close(found, expected)
    assert len(runs) == 4, "every layer ran here"


@pytest.mark.parametrize("name", NAMES)
def test_without_the_spans_it_is_another_model(name: str) -> None:
    """What a kernel that knows no image mask computes is not what these tests pass."""
    made = model(name)
    types = types_of(name, IMAGES["several"], LENGTH)
    given = inputs(name, types)
    expected, found = (logits(made, attention, **given) for attention in ("eager", NAME))
    integration_mask = integration.masks.masking_utils.blockwise_overlay
    broken: Any = {**given, tiny_models.types_name(name): torch.full_like(types, int(name.startswith("pali")))}
    broken.pop("mm_encoder_outputs", None)
    if name == "molmo2":  # the same embeddings, no image tokens: only the mask differs
        pytest.skip("without its types the model does not see the features either")
    dropped = logits(made, NAME, **broken)
    assert (dropped - expected).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-4
    assert integration_mask is integration.masks.masking_utils.blockwise_overlay


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_padding(name: str, side: str) -> None:
    made = model(name)
    real = torch.ones(3, LENGTH, dtype=torch.long)
    images = [[(20, 31)], [(24, 30), (31, 41)], [(28, 40)]]
    for row, pad in zip(real, (0, 10, 20), strict=True):
        row[: pad if side != "right" else 0] = 0
        row[LENGTH - pad if side != "left" else LENGTH :] = 0
    types = types_of(name, images, LENGTH)
    if name.startswith("paligemma"):
        types = types.masked_fill(real == 0, 0)
    given = inputs(name, types) | {"attention_mask": real}
    expected, found = (logits(made, attention, **given) for attention in ("eager", NAME))
    close(found[real == 1], expected[real == 1])
    assert found.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows(name: str) -> None:
    """Documents in one row, by positions that restart, without padding."""
    made = model(name)
    positions = torch.cat([torch.arange(n) for n in (20, 7, 37)])[None]
    given = inputs(name, types_of(name, [[(2, 9), (22, 26), (40, 52)]], LENGTH)) | {"position_ids": positions}
    given |= {"use_cache": False}
    lengths = torch.tensor([0, 20, 27, 64], dtype=torch.int32)
    by_length = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 37, "max_length_k": 37}
    expected = logits(made, "eager", **given)
    close(logits(made, NAME, **given), expected)
    close(logits(made, NAME, **given, **by_length), expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_of_a_kind_shares_its_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plans = model(name, NAME), []
    make = attention_module._make_plan
    monkeypatch.setattr(attention_module, "_make_plan", lambda *a: plans.append(a) or make(*a))
    logits(made, NAME, **inputs(name, types_of(name, IMAGES["several"], LENGTH)))
    assert len(plans) == (2 if name in WITH_WINDOW else 1)


@pytest.mark.parametrize("name", NAMES)
def test_one_read_of_the_device_a_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None a layer. On a GPU a read is a synchronisation."""
    made, reads = model(name, NAME), []
    given = inputs(name, types_of(name, IMAGES["several"], LENGTH))
    given |= {"attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}
    read = integration.masks._read_back
    monkeypatch.setattr(integration.masks, "_read_back", lambda waiting: reads.append(len(waiting)) or read(waiting))
    logits(made, NAME, **given)
    assert reads == [2 if name in WITH_WINDOW else 1]


# ------------------------------------------------------------------------------------------------------- generate


def generate(made: Any, attention: str, given: dict[str, Any], **options: Any) -> torch.Tensor:
    made.set_attn_implementation(attention)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False} | options
    return made.generate(**given, **options)


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
    "offloaded": {"cache_implementation": "offloaded"},
    "in chunks": {"prefill_chunk_size": 20},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_generate(name: str, cache: str, runs: list[int]) -> None:
    """Token for token, with left padding."""
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers offloads from a GPU")
    made = model(name)
    real = torch.ones(2, 40, dtype=torch.long)
    real[1, :9] = 0
    types = types_of(name, [[(3, 17), (20, 24)], [(12, 33)]], 40)
    if name.startswith("paligemma"):
        types = types.masked_fill(real == 0, 0)
    given = inputs(name, types) | {"attention_mask": real}
    try:
        expected = generate(made, "eager", given, **CACHES[cache])
    except Exception as error:  # transformers' own limits: there is nothing to compare with
        pytest.skip(f"eager does not run it: {type(error).__name__}: {error}"[:120])
    assert (generate(made, NAME, given, **CACHES[cache]) == expected).all()
    assert runs, "the prefill ran here"
