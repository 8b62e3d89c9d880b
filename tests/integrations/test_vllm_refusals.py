"""What of vLLM's configuration is refused at start-up, and which vLLM the backends register with. No vLLM is needed."""

from __future__ import annotations

import logging
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fa4_prefixlm.fa4.builds.head_dims import HeadDims
from fa4_prefixlm.integrations.vllm import refusals, register


def configuration(**changed: Any) -> SimpleNamespace:
    """A `VllmConfig` of Gemma 3 that is run, with other values by their names in it."""
    parts: dict[str, dict[str, Any]] = {
        "parallel_config": {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_ubatching": False,
        },
        "model_config": {"is_mm_prefix_lm": True},
        "cache_config": {"kv_sharing_fast_prefill": False},
        "scheduler_config": {"is_multimodal_model": True, "disable_chunked_mm_input": True},
    }
    config = SimpleNamespace(speculative_config=changed.pop("speculative_config", None))
    for name, part in parts.items():
        setattr(config, name, SimpleNamespace(**{key: changed.pop(key, value) for key, value in part.items()}))
    assert not changed
    return config


def test_gemma3_is_run() -> None:
    assert refusals.of_configuration(configuration()) == []
    assert refusals.of_configuration(configuration(is_multimodal_model=False, disable_chunked_mm_input=False)) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"speculative_config": object()}, "speculative decoding: "),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size = 2: "),
        ({"prefill_context_parallel_size": 4}, "prefill_context_parallel_size = 4: "),
        ({"use_ubatching": True}, "micro-batching"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill: "),
        ({"disable_chunked_mm_input": False}, "disable_chunked_mm_input must be set"),
    ],
)
def test_what_would_be_wrong_without_a_word_is_refused(changed: dict[str, Any], said: str) -> None:
    (reason,) = refusals.of_configuration(configuration(**changed))
    assert reason.startswith(said)
    text_only = refusals.of_configuration(configuration(**changed, is_mm_prefix_lm=False))
    assert len(text_only) == (1 if "parallel_size" in said or "speculative" in said else 0)


def test_all_reasons_are_said_at_once() -> None:
    changed = {"speculative_config": object(), "use_ubatching": True, "disable_chunked_mm_input": False}
    assert len(refusals.of_configuration(configuration(**changed))) == 3


def test_caches_by_their_kind() -> None:
    def cache(kind: str, **own: Any) -> Any:
        return type(kind, (SimpleNamespace,), {})(head_size=64, **own)

    assert refusals.of_cache(cache("FullAttentionSpec")) is None
    assert refusals.of_cache(cache("SlidingWindowSpec", head_size_v=64)) is None
    for kind in ("MLAAttentionSpec", "EncoderOnlyAttentionSpec", "CrossAttentionSpec", "ChunkedLocalAttentionSpec"):
        assert refusals.of_cache(cache(kind)) == f"a cache of {kind}; only FullAttentionSpec and SlidingWindowSpec"
    assert refusals.of_cache(cache("FullAttentionSpec", attention_chunk_size=8)) == "chunked local attention"
    assert refusals.of_cache(cache("FullAttentionSpec", head_size_v=32)) == "values of head dim 32 beside keys of 64"


def test_head_dims_by_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = SimpleNamespace(name="vllm 0.33.0", head_dims=HeadDims(sm90_pairs=frozenset({(512, 512)})))
    monkeypatch.setattr(refusals, "fa4", lambda: fork)
    assert refusals.of_kernels(512, 90) is None
    assert refusals.of_kernels(128, 100) is None
    assert (refusals.of_kernels(512, 100) or "").startswith("head dim 512 on vllm 0.33.0: SM100 takes head dims up to")
    monkeypatch.setattr(refusals, "fa4", lambda: None)
    assert "neither vLLM's own nor flash-attn-4" in (refusals.of_kernels(128, 90) or "")


@pytest.mark.parametrize("version", ["0.33.0", "0.33.1", "0.33.0+cu130", "0.33.0rc1", "0.33"])
def test_the_vllm_that_it_was_made_for(version: str) -> None:
    assert register.unsupported(version) is None


@pytest.mark.parametrize("version", ["0.32.0", "0.34.0", "0.330.0", "1.0.33", "0.3.3", "dev"])
def test_another_vllm_is_not_registered_with(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(register.importlib.metadata, "version", lambda package: version)
    monkeypatch.setattr(register, "_register", lambda: pytest.fail("it was registered"))
    monkeypatch.setattr(register.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        register.register()
    assert f"FA4_PREFIXLM and FA4_PREFIXLM_ALL are not registered: this is vLLM {version}" in caplog.text


def test_what_goes_wrong_is_logged_and_vllm_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(register.importlib.metadata, "version", lambda package: "0.33.0")

    def fails() -> None:
        raise ImportError("no registry")

    monkeypatch.setattr(register, "_register", fails)
    register.register()
    assert "are not registered" in caplog.text
    assert "no registry" in caplog.text


def test_the_entry_point_is_declared_and_imports_nothing_that_is_slow() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["fa4_prefixlm"].partition(":")
    assert (module, function) == (register.__name__, register.register.__name__)
    code = (
        f"import sys, {module};"
        "print([name for name in ('vllm', 'cutlass', 'flash_attn', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
