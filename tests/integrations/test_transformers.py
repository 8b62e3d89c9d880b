"""Models of transformers with `attn_implementation="fa4_prefixlm"` against eager attention, float32, on the CPU."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")

import fa4_prefixlm as fp  # noqa: E402
import fa4_prefixlm.integrations.transformers as integration  # noqa: E402
from fa4_prefixlm.backends.reference import Dense  # noqa: E402
from fa4_prefixlm.errors import UnsupportedError  # noqa: E402
from fa4_prefixlm.integrations.transformers import layer_attention as attention_module  # noqa: E402
from fa4_prefixlm.integrations.transformers import masks, row_bounds, row_runs  # noqa: E402
from tests.integrations import tiny_models  # noqa: E402
from tests.integrations.tiny_models import CACHE, NAME, NAMES, WITH_WINDOW, inputs, logits, model, text_model, types_of  # noqa: E402

pytestmark = pytest.mark.slow

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
def test_without_the_spans_it_is_another_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel that knows no image mask computes would not pass these tests."""
    made = model(name)
    given = inputs(name, types_of(name, IMAGES["several"], LENGTH))
    expected = logits(made, "eager", **given)
    close(logits(made, NAME, **given), expected)
    none = torch.full((2, LENGTH), -1)
    for module, reader in ((row_runs, "_own_id"), (row_bounds, "_same_id")):
        right = getattr(module, reader)
        without = lambda ids, *own, right=right, **options: right(none, *own, **options)  # noqa: E731
        monkeypatch.setattr(module, reader, without)
    dropped = logits(made, NAME, **given)
    assert (dropped - expected).abs().max() > 0.05 * expected.abs().max()


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
    """None a layer, and a second one where rows see several runs of keys. On a GPU a read is a synchronisation."""
    made, reads = model(name, NAME), []
    given = inputs(name, types_of(name, IMAGES["several"], LENGTH))
    given |= {"attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}
    read = integration.masks.read_back
    monkeypatch.setattr(integration.masks, "read_back", lambda waiting: reads.append(len(waiting)) or read(waiting))
    logits(made, NAME, **given)
    several = [1] if name == "molmo2" else []
    assert reads == [2 if name in WITH_WINDOW else 1, *several]


# ------------------------------------------------------------------------------------------------------- generate


def generate(made: Any, attention: str, given: dict[str, Any], **options: Any) -> torch.Tensor:
    made.set_attn_implementation(attention)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False} | options
    return made.generate(**given, **options)


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 20},
}


# They raise with eager attention too.
NOT_IN_TRANSFORMERS = {("paligemma2", "static"), ("molmo2", "in chunks")}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_generate(name: str, cache: str, runs: list[int]) -> None:
    """Token for token, with left padding."""
    made = model(name)
    real = torch.ones(2, 40, dtype=torch.long)
    real[1, :9] = 0
    types = types_of(name, [[(3, 17), (20, 24)], [(12, 33)]], 40)
    if name.startswith("paligemma"):
        types = types.masked_fill(real == 0, 0)
    given = inputs(name, types) | {"attention_mask": real}
    if (name, cache) in NOT_IN_TRANSFORMERS:
        with pytest.raises((TypeError, AttributeError)):
            generate(made, "eager", given, **CACHES[cache])
        pytest.skip("transformers does not run it, with eager attention neither")
    expected = generate(made, "eager", given, **CACHES[cache])
    assert (generate(made, NAME, given, **CACHES[cache]) == expected).all()
    assert runs, "the prefill ran here"


def test_decoding_past_the_window() -> None:
    """The sliding cache drops keys: kv_offset is not 0."""
    made = model("gemma3", window=8)
    given = inputs("gemma3", types_of("gemma3", [[(3, 17)]], 30))
    options = {"max_new_tokens": 30, "min_new_tokens": 30}
    assert (generate(made, NAME, given, **options) == generate(made, "eager", given, **options)).all()


def test_beam_search() -> None:
    made = model("gemma3")
    given = inputs("gemma3", types_of("gemma3", [[(3, 17)], [(2, 30)]], 40))
    assert (generate(made, NAME, given, num_beams=3) == generate(made, "eager", given, num_beams=3)).all()


@pytest.mark.parametrize("candidates", [4, 24])
def test_assisted_decoding(candidates: int) -> None:
    """Several rows a step: a few, and more than `FEW_QUERIES`."""
    made, assistant = text_model("gemma3_text", **TEXT_MODELS["gemma3_text"]), text_model("llama", seed=1)
    assistant.generation_config.num_assistant_tokens = candidates
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    given = {"input_ids": torch.randint(6, 32, (1, 40), generator=torch.Generator().manual_seed(0))}
    options = {"assistant_model": assistant, "max_new_tokens": 40, "min_new_tokens": 40}
    assert (generate(made, NAME, given, **options) == generate(made, "eager", given, **options)).all()


class RoundedLayer(transformers.cache_utils.QuantizedLayer):
    """A quantised cache without a library: eight bits, by rounding."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantised: Any) -> torch.Tensor:
        return quantised[0] * quantised[1]


def test_quantised_cache() -> None:
    """Keys come back other than they were stored, and are attended to as they come back."""
    made = model("paligemma1")
    given = inputs("paligemma1", types_of("paligemma1", [[(0, 30)]], 40))
    found = []
    for attention in ("eager", NAME):
        cache = transformers.Cache(layers=[RoundedLayer(nbits=8, residual_length=16) for _ in range(4)])
        found.append(generate(made, attention, given, **{CACHE: cache}))
    assert (found[0] == found[1]).all()


def test_keys_that_the_mask_is_not_for() -> None:
    """A cache that returns other keys than it announced is refused, not run."""

    class Drops(transformers.DynamicCache):
        def update(self, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any) -> Any:
            key, value = super().update(key, value, *rest, **more)
            return key[:, :, 1:], value[:, :, 1:]

    made = model("gemma3", NAME)
    given = inputs("gemma3", types_of("gemma3", [[(3, 17)]], 40))
    with pytest.raises(fp.InputError, match="key: expected 40 keys, as the mask was made for"), torch.no_grad():
        made(**given, **{CACHE: Drops(config=made.config)})


# ------------------------------------------------------------------------------------------------- other models

_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": _SLIDING | {"attn_logit_softcapping": 5.0},
    "gemma3_text": _SLIDING,
    "gemma4_text": _SLIDING | tiny_models._GEMMA4,
    "gpt_oss": _SLIDING | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "llama4_text": {"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"] * 2}
    | {"num_local_experts": 2, "intermediate_size_mlp": 32},
}


@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_models(name: str, pad: str, runs: list[int]) -> None:
    """Windows, chunks, softcap, sinks, head dims of a kind of layer."""
    made = text_model(name, **TEXT_MODELS[name])
    real = torch.ones(2, LENGTH, dtype=torch.long)
    if pad != "none":
        real[1, :9] = 0
        real = real if pad == "left" else real.flip(1)
    given = {"input_ids": torch.randint(6, 32, (2, LENGTH)), "attention_mask": real}
    expected = logits(made, "eager", **given)[real == 1]
    close(logits(made, NAME, **given)[real == 1], expected)
    assert len(runs) == 4
    if pad != "right":  # after which the next token is that of a row which may see nothing
        assert (generate(made, NAME, given) == generate(made, "eager", given)).all()


def test_text_models_run_the_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """FA4's own causal and windowed calls are taken on a GPU: the plans' masks are just that."""
    plans: list[Any] = []
    make = attention_module._make_plan
    monkeypatch.setattr(attention_module, "_make_plan", lambda *a: plans.append(make(*a)) or plans[-1])
    given = {"input_ids": torch.randint(6, 32, (2, LENGTH)), "attention_mask": torch.ones(2, LENGTH)}
    logits(text_model("gemma3_text", NAME, **TEXT_MODELS["gemma3_text"]), NAME, **given)
    assert [plan.traits.causal_only.window for plan in plans] == [8, None]


@pytest.mark.parametrize("name", ["gemma3", "paligemma1"])
def test_with_a_vision_tower(name: str) -> None:
    """The same string reaches it: no mask, and not causal."""
    made = model(name)
    given = inputs(name, types_of(name, [[(2, 6)]], 40))
    given["input_ids"][0, 2:6] = made.config.image_token_id
    given["pixel_values"] = torch.randn(1, 3, 28, 28)
    expected = logits(made, "eager", **given)
    assert made.config.vision_config._attn_implementation == "eager"
    close(logits(made, NAME, **given), expected)
    assert made.config.vision_config._attn_implementation == NAME


def test_gemma4s_vision_tower(runs: list[int]) -> None:
    """It has a mask of its own: everything but padding."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64}
    config = transformers.AutoConfig.for_model("gemma4_vision", **sizes)
    torch.manual_seed(0)
    made = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    grid = torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(2, -1, -1).clone()
    grid[1, 18:] = -1
    given = {"pixel_values": torch.randn(2, 36, 48), "pixel_position_ids": grid}
    with torch.no_grad():
        expected = made(**given).last_hidden_state
        made.set_attn_implementation(NAME)
        close(made(**given).last_hidden_state, expected)
    assert len(runs) == 2


def test_gemma4s_audio_tower_gets_its_own_kind_of_mask() -> None:
    """It works on the mask itself, and takes it as eager attention has it."""
    masking_utils = integration.masks.masking_utils
    overlay = transformers.models.gemma4.modeling_gemma4.sliding_window_mask_function((3, 4))
    function = masking_utils.and_masks(masking_utils.bidirectional_mask_function, overlay)
    sizes = {"batch_size": 1, "q_length": 30, "kv_length": 30, "mask_function": function, "use_vmap": True}
    # The arguments that transformers gives to every mask function.
    skips = {"allow_is_causal_skip": True, "allow_is_bidirectional_skip": False, "local_size": None}
    found = integration.mask(**sizes, **skips, dtype=torch.float32)
    assert (found == masking_utils.eager_mask(**sizes)).all()


@pytest.mark.parametrize("padded", [False, True])
def test_windows_that_look_both_ways(padded: bool) -> None:
    """ModernBERT without padding: transformers lets a mask be left out where the window holds every key."""
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    tokens = {f"{name}_token_id": index for index, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    windows = {"num_attention_heads": 4, "local_attention": 8, "global_attn_every_n_layers": 2}
    config = transformers.AutoConfig.for_model("modernbert", **sizes, **tokens, **windows)
    torch.manual_seed(0)
    made = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    for weight in made.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4)
    given: dict[str, Any] = {"input_ids": torch.randint(6, 32, (2, 64))}
    if padded:
        given["attention_mask"] = torch.ones(2, 64, dtype=torch.long)
    hidden = {}
    for name in ("eager", NAME):
        made.set_attn_implementation(name)
        with torch.no_grad():
            hidden[name] = made(**given).last_hidden_state
    assert (hidden[NAME] - hidden["eager"]).abs().max() < 1e-4 * hidden["eager"].abs().max()


@pytest.mark.parametrize("pad", [False, True])
def test_pi0(pad: bool, runs: list[int]) -> None:
    """A policy: images and prompt, state, actions. Each block sees itself and those before it."""
    text = {key: value for key, value in tiny_models._TEXT.items() if key != "num_hidden_layers"}
    text |= {"model_type": "gemma", "num_hidden_layers": 2}
    vision = {**tiny_models.oracles._SIGLIP["vision_config"], "model_type": "siglip_vision_model"}
    vlm = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": 32}
    config = transformers.AutoConfig.for_model(
        "pi0",
        vlm_config={**vlm, "image_token_id": 31},
        dit_config=text,
        chunk_size=24,
        max_state_dim=8,
        max_action_dim=8,
    )
    torch.manual_seed(0)
    made = transformers.PI0ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(6, 30, (2, 30))
    ids[:, :4] = 31
    real = torch.ones(2, 30, dtype=torch.long)
    real[1, 25:] = 1 - int(pad)
    given = {"input_ids": ids, "attention_mask": real, "pixel_values": torch.randn(2, 1, 3, 28, 28)}
    given |= {"pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool), "state": torch.randn(2, 8)}
    given |= {"noise": torch.randn(2, 24, 8), "timestep": torch.rand(2)}
    close(logits(made, NAME, **given), logits(made, "eager", **given))
    assert len(runs) == 4


def test_a_mask_of_ones_own() -> None:
    """A dense mask is run as it is, whatever its dtype."""
    made = text_model("llama")
    given = {"input_ids": torch.randint(6, 32, (1, LENGTH))}
    seen = torch.rand(1, 1, LENGTH, LENGTH) < 0.5
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = logits(made, "eager", **given, attention_mask=additive)
    for own in (seen, additive):
        close(logits(made, NAME, **given, attention_mask=own), expected)


def test_more_runs_of_keys_than_kernels_take(runs: list[int]) -> None:
    """SDPA's own mask, with one warning that says so."""
    made = model("molmo2")
    images = [[(start, start + 4) for start in range(2, 62, 10)]]
    given = inputs("molmo2", types_of("molmo2", images, LENGTH))
    expected = logits(made, "eager", **given)
    integration.masks._warned.clear()
    with pytest.warns(UserWarning, match="more than 4 runs of keys") as caught:
        found = logits(made, NAME, **given)
    assert len(caught) == 1
    close(found, expected)
    assert not runs


def test_inference_mode_and_autocast() -> None:
    made = model("gemma3")
    given = inputs("gemma3", types_of("gemma3", IMAGES["several"], LENGTH))
    expected = logits(made, "eager", **given)
    made.set_attn_implementation(NAME)
    with torch.inference_mode():
        close(made(**given).logits, expected)
    found = []
    for attention in ("eager", NAME):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(logits(made, attention, **given).float())
    assert (found[1] - expected).abs().max() < 2 * (found[0] - expected).abs().max()


def test_dropout_is_refused() -> None:
    made = text_model("llama", NAME, attention_dropout=0.1).train()
    with pytest.raises(fp.InputError, match="attention_dropout: expected 0.0"):
        made(input_ids=torch.randint(6, 32, (1, LENGTH)))


def test_a_model_that_changes_its_masks_is_refused() -> None:
    layer = torch.nn.Module()
    q = torch.randn(1, 2, 20, 8)
    for shape in ((1, 1, 20, 3), (1, 1, 21, 2), (1, 20, 2), (1, 20), ()):
        changed = torch.zeros(shape, dtype=torch.int32)
        with pytest.raises(fp.InputError, match="does the model change its masks"):
            integration.attention(layer, q, q, q, changed)


@pytest.mark.parametrize(
    ("version", "says"), [("5.22.3", "needs transformers 5.23 or 5.24"), ("5.31.0", "tested with")]
)
def test_versions(version: str, says: str) -> None:
    code = (
        "import transformers; transformers.__version__ = {!r}\n"
        "import warnings; warnings.simplefilter('error')\n"
        "import fa4_prefixlm.integrations.transformers"
    )
    done = subprocess.run([sys.executable, "-c", code.format(version)], capture_output=True, text=True)
    assert done.returncode
    assert says in done.stderr
    assert version in done.stderr


@pytest.mark.parametrize("name", ["molmo2", "gemma3", "paligemma2"])
def test_a_static_cache_that_is_filled_again_and_in_chunks(name: str) -> None:
    """With rows that see several runs of keys: their mask is made once the first layer has moved the cache on."""
    made = model(name)
    given = inputs(name, types_of(name, [[(3, 12), (20, 30)]], 60))
    if name != "molmo2":  # a hole in the padding
        given["attention_mask"] = torch.ones(1, 60, dtype=torch.long)
        given["attention_mask"][:, 32:36] = 0
    real = given.get("attention_mask", torch.ones(1, 60))[0] == 1
    found = []
    for attention in ("eager", NAME):
        made.set_attn_implementation(attention)
        cache = transformers.StaticCache(config=made.config.get_text_config(), max_cache_len=70)
        with torch.no_grad():
            made(**copy.deepcopy(given), **{CACHE: cache})
            cache.reset()
            found.append(made(**copy.deepcopy(given), **{CACHE: cache}).logits[0][real])
    close(found[1], found[0])


@pytest.mark.parametrize("rows", [10, 40])
def test_models_that_calculate_with_their_masks(rows: int) -> None:
    """Bloom adds its mask to scores itself, so it gets eager attention's."""
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    made = [
        transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()
        for attention in ("eager", NAME)
    ]
    made[1].load_state_dict(made[0].state_dict())
    tokens = torch.randint(64, (2, rows), generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, rows, dtype=torch.long)
    real[1, :4] = 0
    with torch.no_grad():
        eager, ours = (own(input_ids=tokens, attention_mask=real).logits[real == 1] for own in made)
    close(ours, eager)


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_what_would_be_dropped_is_refused(name: str) -> None:
    """A choice of keys, or sinks by another name, which a model gives its attention function."""
    q = torch.randn(1, 2, 20, 16)
    with pytest.raises(UnsupportedError, match=f"^{name}: expected None"):
        integration.attention(torch.nn.Module(), q, q, q, None, **{name: torch.zeros(2)})


def test_weights_that_are_not_there_are_told() -> None:
    masks._warned.clear()
    q = torch.randn(1, 2, 20, 16)
    with pytest.warns(UserWarning, match="no attention weights"):
        integration.attention(torch.nn.Module(), q, q, q, None, output_attentions=True)


def test_a_trace_runs_batches_with_other_padding() -> None:
    made = text_model("llama").requires_grad_(False)
    tokens = torch.randint(made.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    first, other = torch.ones(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.long)
    first[0, :5], other[1, :9] = 0, 0

    class Logits(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
            return made(input_ids=tokens, attention_mask=real, use_cache=False).logits

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.set_attn_implementation(NAME)
        traced = torch.jit.trace(Logits(), (tokens, first), check_trace=False)
        found = traced(tokens, other)[other == 1]
        made.set_attn_implementation("eager")
        close(found, Logits()(tokens, other)[other == 1])
