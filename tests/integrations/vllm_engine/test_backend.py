"""The backend in vLLM's own classes: how it is found, what it refuses and how, what it writes to the cache."""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.fa4.builds.head_dims import HeadDims
from fa4_prefixlm.integrations.vllm import refusals, register
from tests.integrations.vllm_engine import engine, models

pytestmark = pytest.mark.slow  # importing vLLM takes seconds


@pytest.fixture
def backend() -> Any:
    from fa4_prefixlm.integrations.vllm import backend

    return backend


def test_vllm_finds_both_forms_by_the_entry_point() -> None:
    code = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
import sys
print([name for name in ("flash_attn", "cutlass") if name in sys.modules])
print("fa4_prefixlm.integrations.vllm.backend" in sys.modules)
for name in ("FA4_PREFIXLM", "FA4_PREFIXLM_ALL"):
    print(AttentionBackendEnum[name].get_class().get_name())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-4:] == ["[]", "False", "FA4_PREFIXLM", "FA4_PREFIXLM_ALL"]


def test_registering_twice_is_once() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for _ in range(2):
        register.register()
    assert set(register.BACKENDS) <= set(AttentionBackendEnum.__members__)
    for name, path in register.BACKENDS.items():
        assert AttentionBackendEnum[name].get_path() == path
        assert AttentionBackendEnum[name].get_class().full_cls_name() == tuple(path.rsplit(".", 1))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_configuration_reaches_a_process_that_has_no_plugins_yet(protocol: int) -> None:
    """Engine and workers are spawned, and what they get is unpickled before they load plugins."""
    from vllm.config.attention import AttentionConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register.register()
    config = AttentionConfig(backend="FA4_PREFIXLM", backend_per_kind={"full_attention": "FLASH_ATTN"})
    config.backend_per_kind["sliding_window"] = AttentionBackendEnum.CUSTOM
    code = "import pickle, sys; own = pickle.load(sys.stdin.buffer); print(own.backend.name, own.backend_per_kind)"
    sent = pickle.dumps(config, protocol)
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    said = done.stdout.decode()
    assert "FA4_PREFIXLM {" in said
    assert "FLASH_ATTN" in said
    assert "CUSTOM" in said
    assert pickle.loads(sent).backend is AttentionBackendEnum["FA4_PREFIXLM"]


def test_the_flag_of_vllm_serve() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register.register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--attention-backend", "FA4_PREFIXLM"], ["--attention-config", '{"backend": "FA4_PREFIXLM"}']
    short, whole = (parser.parse_args(["--model", "m", *own]) for own in flags)
    assert getattr(short.attention_backend, "name", short.attention_backend) == "FA4_PREFIXLM"
    assert whole.attention_config.backend.name == "FA4_PREFIXLM"


def configuration(**changed: Any) -> dict[str, Any]:
    """What vLLM asks of a backend for a layer of Gemma 3 on a Hopper GPU."""
    from vllm.platforms.interface import DeviceCapability

    return {
        "head_size": 256,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": True,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder",
        "has_sliding_window": True,
        **changed,
    }


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "an fp8 cache": ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
    "a cache of fp8_e5m2": ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
    "float32": ({"dtype": torch.float32}, "dtype not supported"),
    "blocks of 8": ({"block_size": 8}, "block_size not supported"),
    "MLA": ({"use_mla": True}, "MLA not supported"),
    "sparse attention": ({"use_sparse": True}, "sparse not supported"),
    "scales of heads": ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
    "encoders": ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
    "cross attention": ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder not supported"),
    "R-SWA": ({"use_rswa": True}, "R-SWA not supported"),
    "non-causal requests": ({"use_non_causal": True}, "non-causal attention not supported"),
    "batch invariance": ({"use_batch_invariant": True}, "batch invariance not supported"),
    "DCP": ({"use_dcp": True}, "DCP not supported"),
    "PCP": ({"use_pcp": True}, "PCP not supported"),
    "adaptive verification": ({"use_adaptive_verification": True}, "device-cpu query lens mismatch not supported"),
    "head dim 512": ({"head_size": 512}, "head dim 512 on an FA4: SM90 takes head dims up to 256"),
    "head dim 100": ({"head_size": 100}, "head dims must be multiples of 8"),
}


@pytest.fixture
def an_fa4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "fa4", lambda: SimpleNamespace(name="an FA4", head_dims=HeadDims()))


@pytest.mark.usefixtures("an_fa4")
def test_what_it_takes(backend: Any) -> None:
    for changed in ({}, {"has_sink": True}, {"use_kv_connector": True}, {"kv_cache_dtype": "bfloat16"}):
        assert backend.PrefixLMBackend.validate_configuration(**configuration(**changed)) == []


@pytest.mark.usefixtures("an_fa4")
@pytest.mark.parametrize("name", CHANGES)
def test_what_it_declares_not_to_take(backend: Any, name: str) -> None:
    changed, expected = CHANGES[name]
    (reason,) = backend.PrefixLMBackend.validate_configuration(**configuration(**changed))
    assert expected in reason


@pytest.mark.usefixtures("an_fa4")
def test_other_gpus_and_no_fa4(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms.interface import DeviceCapability

    ampere = configuration(device_capability=DeviceCapability(8, 0))
    (reason,) = backend.PrefixLMBackend.validate_configuration(**ampere)
    assert "no kernel for sm_80" in reason
    monkeypatch.setattr(refusals, "fa4", lambda: None)
    (reason,) = backend.PrefixLMBackend.validate_configuration(**configuration())
    assert "FlashAttention-4 is not installed" in reason


@pytest.mark.usefixtures("an_fa4")
def test_a_whole_configuration_is_looked_at_when_vllm_chooses(backend: Any) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    config.model_config = SimpleNamespace(is_mm_prefix_lm=True)  # type: ignore[assignment]
    config.scheduler_config.is_multimodal_model = True
    config.scheduler_config.disable_chunked_mm_input = False
    with set_current_vllm_config(config):
        (reason,) = backend.PrefixLMBackend.validate_configuration(**configuration())
        assert "disable_chunked_mm_input" in reason
        config.scheduler_config.disable_chunked_mm_input = True
        assert backend.PrefixLMBackend.validate_configuration(**configuration()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alibi_slopes": [0.5]}, "alibi_slopes: expected none"),
        ({"attn_type": "encoder"}, "attn_type: expected decoder attention"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: expected one of auto, float16, bfloat16, got fp8"),
    ],
)
def test_layers_that_it_refuses(backend: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.UnsupportedError, match=message):
        backend.PrefixLMImpl(4, 64, 0.125, 2, **changed)
    with pytest.raises(fp.UnsupportedError, match="output_scale"):
        made(backend).forward(None, None, None, None, None, None, None, torch.ones(1))


def made(backend: Any) -> Any:
    return backend.PrefixLMImpl(4, 16, 0.25, 2)


def test_without_metadata_there_are_zeros(backend: Any) -> None:
    out = torch.ones(3, 4, 16)
    assert made(backend).forward(None, out, out, out, None, None, out) is out
    assert not out.any()


def test_a_layer_hands_on_what_it_was_made_with(backend: Any) -> None:
    given: dict[str, Any] = {}

    class Plans:
        @staticmethod
        def attention(layer: str, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
            given.update(options, layer=layer, tensors=tensors)
            return tensors[2]

    q, cache, out, sinks = torch.ones(3, 4, 16), torch.ones(1), torch.zeros(3, 4, 16), torch.ones(4)
    layer = backend.PrefixLMImpl(4, 16, 0.25, 2, logits_soft_cap=30.0, sinks=sinks)
    metadata = backend.PrefixLMMetadata(Plans(), 3, torch.arange(3))
    assert layer.forward(SimpleNamespace(layer_name="a"), q, None, None, cache, metadata, out) is out
    options = {"softmax_scale": 0.25, "softcap": 30.0, "sinks": sinks}
    assert given == {**options, "layer": "a", "tensors": (q, cache, out)}


def test_the_engine_does_not_start_with_what_is_refused(tmp_path: pathlib.Path) -> None:
    models.make("gemma3", tmp_path / "gemma3")
    job = engine.Job(str(tmp_path / "gemma3"), str(tmp_path / "out.pt"), cpu="V1")
    program = """
import pathlib, sys
from tests.integrations.vllm_engine import engine
engine.make_engine(engine.read_job(pathlib.Path(sys.argv[1])), disable_chunked_mm_input=False)
"""
    assert job.start(job.log, ["-c", program]).wait() != 0
    log = job.log.read_text()
    assert "attention_backend: expected a configuration that FA4_PREFIXLM runs, got disable_chunked_mm_input" in log


@pytest.mark.parametrize("heads_first", [False, True])
def test_the_cache_is_written_where_the_slots_say(backend: Any, heads_first: bool) -> None:
    """Both of vLLM's layouts; padding has no slot, and rows past the slots are padding too."""
    cache = torch.zeros(5, 2, 16, 32) if heads_first else torch.zeros(5, 16, 2, 32).transpose(1, 2)
    key, value = torch.randn(2, 6, 2, 16)
    slots = torch.tensor([33, 34, 79, -1])
    made(backend).do_kv_cache_update(None, key, value, cache, slots)
    for row, slot in enumerate([33, 34, 79]):
        held = cache[slot // 16, :, slot % 16]
        assert torch.equal(held, torch.cat([key[row], value[row]], dim=1))
    assert int(cache.ne(0).any(dim=3).any(dim=1).sum()) == 3


def builder(backend: Any) -> Any:
    return object.__new__(backend.PrefixLMBuilder)


def test_a_step_is_placed_once_for_all_groups(backend: Any) -> None:
    starts, keys, ranges = torch.tensor([0, 40, 41, 41]), torch.tensor([40, 70, 0]), {0: [(3, 20)]}
    placed = backend._placed(starts, keys, ranges, 3)
    assert (placed.rows, placed.keys, placed.spans) == ([40, 1, 0], [40, 70, 0], [[(3, 21)], [], []])
    assert (placed.tokens, placed.longest) == (41, 70)
    assert backend._placed(starts, keys, ranges, 3) is placed
    for other in ((starts.clone(), keys, ranges), (starts, keys.clone(), ranges), (starts, keys, dict(ranges))):
        assert backend._placed(*other, 3) is not placed
    assert backend._placed(starts, keys, None, 2).rows == [40, 1]
    keys += 1  # without ranges there is no object that tells one step from the next
    assert backend._placed(starts, keys, None, 2).keys == [41, 71]


@pytest.mark.parametrize("causal", [False, torch.ones(2, dtype=torch.int32)], ids=str)
def test_a_step_that_is_not_causal_is_refused(backend: Any, causal: object) -> None:
    with pytest.raises(fp.UnsupportedError, match="causal: expected True for all requests"):
        builder(backend).build(0, SimpleNamespace(causal=causal))


def test_a_step_without_lengths_on_the_host_is_refused(backend: Any) -> None:
    with pytest.raises(fp.UnsupportedError, match="seq_lens_cpu_upper_bound"):
        builder(backend).build(0, SimpleNamespace(causal=True, seq_lens_cpu_upper_bound=None))


def test_the_builder_refuses_what_the_platform_did_not_ask_about(backend: Any) -> None:
    config = SimpleNamespace(
        speculative_config=object(),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        model_config=SimpleNamespace(is_mm_prefix_lm=False),
    )
    with pytest.raises(fp.UnsupportedError, match=r"attention_backend: .* speculative decoding"):
        backend.PrefixLMBuilder(SimpleNamespace(head_size=64), ["layer"], config, torch.device("cpu"))


def test_no_graphs_where_a_plan_is_made_anew(backend: Any) -> None:
    """Here, on the reference."""
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    layer = SimpleNamespace(
        head_size=64, num_kv_heads=2, num_heads=4, sliding_window=None, mm_prefix_clamp_sliding_window=False
    )
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"a": layer}, max_cudagraph_capture_size=8),
        device_config=SimpleNamespace(device_type="cpu"),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=4),
        model_config=SimpleNamespace(is_mm_prefix_lm=True, max_model_len=128, hf_text_config=SimpleNamespace()),
    )
    assert backend.PrefixLMBuilder.get_cudagraph_support(config, spec) == AttentionCGSupport.NEVER


def test_the_cache_of_this_vllm_is_one_that_it_takes() -> None:
    """The names in `refusals.CACHES` are vLLM's."""
    from vllm.v1 import kv_cache_interface as caches

    common = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    assert refusals.of_cache(caches.FullAttentionSpec(**common)) is None
    assert refusals.of_cache(caches.SlidingWindowSpec(**common, sliding_window=32)) is None
    assert "chunked" in refusals.of_cache(caches.FullAttentionSpec(**common, attention_chunk_size=64))
    assert "ChunkedLocalAttentionSpec" in refusals.of_cache(
        caches.ChunkedLocalAttentionSpec(**common, attention_chunk_size=64)
    )
    assert "head dim 32" in refusals.of_cache(caches.FullAttentionSpec(**common, head_size_v=32))


class TestComposite:
    """The form that leaves text to vLLM's FlashAttention. It can't run here: what it routes where."""

    @staticmethod
    def config(window: int | None = 64, *, clamp: bool = False, of_model: int | None = 64) -> Any:
        layers = {
            "local": SimpleNamespace(sliding_window=window, mm_prefix_clamp_sliding_window=clamp),
            "global": SimpleNamespace(sliding_window=None, mm_prefix_clamp_sliding_window=False),
            "no attention": SimpleNamespace(),
        }
        return SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=layers),
            model_config=SimpleNamespace(get_sliding_window=lambda: of_model),
        )

    @classmethod
    def routing(cls, *layers: str, **windows: Any) -> Any:
        from fa4_prefixlm.integrations.vllm.composite import PrefixLMRouting

        return PrefixLMRouting(list(layers or ["local"]), cls.config(**windows))

    @staticmethod
    def step(rows: list[int], keys: list[int], ranges: dict[int, list[tuple[int, int]]] | None) -> Any:
        return SimpleNamespace(
            mm_req_doc_ranges=ranges,
            max_query_len=max(rows),
            seq_lens_cpu_upper_bound=torch.tensor(keys),
            query_start_loc_cpu=torch.tensor([0, *itertools.accumulate(rows)]),
        )

    @pytest.mark.parametrize(
        ("rows", "keys", "ranges", "here"),
        [
            ([40, 1], [40, 20], {0: [(10, 30)], 1: []}, True),
            ([40, 1], [40, 20], {0: [], 1: [(2, 9)]}, False),  # behind the only query
            ([40], [40], None, False),
            ([40], [40], {}, False),
            ([8], [40], {0: [(10, 34)]}, True),  # it began in the prefix cache
            ([8], [40], {0: [(10, 31)]}, False),
            ([1], [31], {0: [(10, 30)]}, False),  # the image's last token: a causal row
            ([1, 1], [31, 90], {0: [(10, 30)], 1: [(4, 60)]}, False),
        ],
    )
    def test_steps_with_images_run_here(
        self, rows: list[int], keys: list[int], ranges: dict[int, list[tuple[int, int]]] | None, here: bool
    ) -> None:
        assert self.routing().select(self.step(rows, keys, ranges)) == (0 if here else 1)

    def test_graphs_of_decoding_are_vllms(self) -> None:
        from vllm.v1.attention.backend import AttentionCGSupport

        routing = self.routing()
        assert routing.get_cudagraph_support(self.config(), None) == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        assert routing.capture_variant == routing.select(self.step([1, 1], [31, 31], {0: [(10, 30)]})) == 1

    @pytest.mark.parametrize(
        ("windows", "can"),
        [
            ({"window": 64, "of_model": 64}, False),
            ({"window": 63, "of_model": 64}, True),  # vLLM keeps a span of 64
            ({"window": 63, "of_model": 64, "clamp": True}, False),
            ({"window": 64, "of_model": None}, True),  # vLLM drops none
            ({"window": None, "of_model": 64}, False),
        ],
    )
    def test_where_a_span_can_be_longer_than_a_window_a_single_query_in_it_runs_here(
        self, windows: dict[str, Any], can: bool
    ) -> None:
        from vllm.v1.attention.backend import AttentionCGSupport

        routing, last_of_a_span = self.routing(**windows), self.step([1], [31], {0: [(10, 30)]})
        assert routing.select(last_of_a_span) == (0 if can else 1)
        assert self.routing("global", **windows).select(last_of_a_span) == 1
        graphs = routing.get_cudagraph_support(self.config(**windows), None)
        assert graphs == (AttentionCGSupport.NEVER if can else AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE)

    def test_it_is_composed_of_both(self) -> None:
        from fa4_prefixlm.integrations.vllm.backend import PrefixLMBackend
        from fa4_prefixlm.integrations.vllm.composite import RoutedPrefixLMBackend
        from fa4_prefixlm.integrations.vllm.text_and_decoding import FlashAttention4Backend

        assert RoutedPrefixLMBackend.get_name() == "FA4_PREFIXLM"
        assert RoutedPrefixLMBackend.general_backend_cls is PrefixLMBackend
        assert RoutedPrefixLMBackend.causal_backend_cls is FlashAttention4Backend
        for refused in ("supports_dcp", "supports_pcp", "supports_non_causal", "supports_batch_invariance"):
            assert not getattr(RoutedPrefixLMBackend, refused)()
        assert not RoutedPrefixLMBackend.supports_kv_cache_dtype("fp8")


class TestTextAndDecoding:
    """vLLM's FlashAttention as version 4. It can't run here: how it is made, and what is compiled for it."""

    @pytest.fixture(autouse=True)
    def a_vllm_with_version_4(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.v1.attention.backends import fa_utils

        monkeypatch.setattr(fa_utils, "is_fa_version_supported", lambda version: version in self.supported)

    supported: tuple[int, ...] = (2, 3, 4)

    @staticmethod
    def config(chosen: int | None) -> Any:
        from vllm.config import VllmConfig

        config = VllmConfig()
        config.attention_config.flash_attn_version = chosen
        return config

    @staticmethod
    def seen_when_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, bool]]:
        """The version and the warm-up that vLLM's classes find in the current configuration."""
        from vllm.config import get_current_vllm_config
        from vllm.v1.attention.backends import flash_attn

        seen: list[tuple[int | None, bool]] = []

        def note(self: Any, *arguments: Any, **named: Any) -> None:
            now = get_current_vllm_config()
            version = now.attention_config.flash_attn_version
            seen.append((version, now.kernel_config.enable_jit_warmup))
            self.vllm_flash_attn_version, self.mm_prefix_query_ranges_np = version, "read by vLLM"

        for theirs in (flash_attn.FlashAttentionImpl, flash_attn.FlashAttentionMetadataBuilder):
            monkeypatch.setattr(theirs, "__init__", note)
        return seen

    @pytest.mark.parametrize(
        ("chosen", "supported", "made"),
        [(None, (2, 3, 4), 4), (3, (2, 3, 4), 3), (2, (2, 3, 4), 2), (None, (2, 3), None)],
    )
    def test_it_is_made_as_version_4_unless_the_user_chose(
        self, chosen: int | None, supported: tuple[int, ...], made: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from vllm.config import set_current_vllm_config

        from fa4_prefixlm.integrations.vllm.text_and_decoding import FlashAttention4Backend

        self.supported = supported
        seen, config = self.seen_when_made(monkeypatch), self.config(chosen)
        with set_current_vllm_config(config):
            FlashAttention4Backend.get_impl_cls()()
        with set_current_vllm_config(self.config(2)):  # the builder's own counts
            builder = FlashAttention4Backend.get_builder_cls()(None, [], config, torch.device("cpu"))
        assert seen == [(made, True), (made, False)]
        assert (config.attention_config.flash_attn_version, config.kernel_config.enable_jit_warmup) == (chosen, True)
        assert builder.mm_prefix_query_ranges_np is None

    def test_the_configuration_is_as_it_was_when_making_fails(self) -> None:
        from fa4_prefixlm.integrations.vllm.text_and_decoding import version_4

        config, seen = self.config(None), []

        def fail() -> None:
            with version_4(config):
                seen.append(config.attention_config.flash_attn_version)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert (seen, config.attention_config.flash_attn_version) == ([4], None)

    def test_on_a_gpu_the_builder_compiles_for_its_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fa4_prefixlm.integrations.vllm import text_and_decoding as own

        self.seen_when_made(monkeypatch)
        asked: list[Any] = []
        monkeypatch.setattr(own, "warm_up", lambda *given: asked.append(given))
        config, gpu = self.config(None), torch.device("cuda")
        config.compilation_config.static_forward_context.update(a="layer a", b="layer b", c="layer c")
        own.FlashAttention4Builder("a cache", ["a", "c"], config, gpu)
        assert asked == [(["layer a", "layer c"], "a cache", config.scheduler_config.max_num_seqs, gpu)]

    @pytest.mark.parametrize(("version", "own_kernels"), [(4, True), (3, False)])
    def test_kernels_of_version_4_are_kept_on_disk(
        self, version: int, own_kernels: bool, an_fa4: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.v1.attention.backends import flash_attn

        from fa4_prefixlm.integrations.vllm import text_and_decoding as own

        within: list[str] = []

        @contextlib.contextmanager
        def enter(build: Any) -> Iterator[None]:
            within.append(build.name)
            yield
            within.append("left")

        monkeypatch.setattr(own.disk_cache, "own_kernels", enter)
        self.seen_when_made(monkeypatch)
        monkeypatch.setattr(flash_attn.FlashAttentionImpl, "forward", lambda self, *given: (*given, *within))
        with set_current_vllm_config(self.config(version)):
            run = own.FlashAttention4Impl().forward("q", "k")
        assert run == (("q", "k", "an FA4") if own_kernels else ("q", "k"))
        assert within == (["an FA4", "left"] if own_kernels else [])

    @staticmethod
    def layer(window: int | None, *, version: int = 4, softcap: float = 0, sinks: Any = None) -> Any:
        from fa4_prefixlm.integrations.vllm.text_and_decoding import FlashAttention4Impl

        impl = object.__new__(FlashAttention4Impl)
        impl.sliding_window = (-1, -1) if window is None else (window - 1, 0)
        impl.logits_soft_cap, impl.sinks, impl.num_heads, impl.vllm_flash_attn_version = softcap, sinks, 4, version
        return SimpleNamespace(impl=SimpleNamespace(get_impl_variants=lambda: (None, impl)))

    @pytest.mark.parametrize(("max_requests", "variants"), [(8, 6), (256, 6), (257, 8)])
    def test_each_kind_of_layer_is_compiled_for(
        self, max_requests: int, variants: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fa4_prefixlm.integrations.vllm import text_and_decoding as own

        ran: list[tuple[Any, Any]] = []

        def run(
            impl: Any, layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Any, step: Any, out: Any
        ) -> None:
            tokens = step.num_actual_tokens
            assert [tuple(one.shape) for one in (q, out, k, v)] == [(tokens, 4, 64)] * 2 + [(tokens, 2, 64)] * 2
            assert (cache.shape, step.block_table.shape) == ((1, 2, 16, 128), (tokens, 1))
            assert {one.dtype for one in (q, out, k, v, cache)} == {torch.bfloat16}
            assert step.query_start_loc.tolist() == list(range(tokens + 1))
            assert step.seq_lens.tolist() == [1] * tokens
            ran.append((impl, step))

        monkeypatch.setattr(own.FlashAttention4Impl, "forward", run)
        spec = SimpleNamespace(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
        kinds = [self.layer(32), self.layer(None), self.layer(32, softcap=50.0), self.layer(32, sinks=torch.ones(4))]
        own.warm_up([*kinds, self.layer(32), self.layer(8, version=2)], spec, max_requests, torch.device("cpu"))
        impls = [layer.impl.get_impl_variants()[1] for layer in kinds]
        assert [impl for impl, _ in ran] == [impl for impl in impls for _ in range(variants)]
        said = {(step.num_actual_tokens, step.max_query_len > 256, step.max_num_splits) for _, step in ran}
        many = {(257, False, 1), (257, True, 1)} if max_requests > 256 else set()
        assert said == {(1, False, 1), (1, True, 1)} | {(1, False, splits) for splits in own.SPLITS} | many

    @pytest.mark.parametrize("head_dim", [64, 80, 128, 256, 512])
    def test_any_number_of_splits_finds_its_kernel(self, head_dim: int) -> None:
        """What adds splits up is compiled by the power of 2 that holds them (`_flash_attn_fwd_combine` of FA4)."""
        from fa4_prefixlm.integrations.vllm.text_and_decoding import SPLITS

        def kernel(splits: int) -> int:
            return max(math.ceil(math.log2(splits)), 4 if head_dim <= 64 else 5)

        assert {kernel(splits) for splits in SPLITS} == {kernel(splits) for splits in range(2, 129)}
