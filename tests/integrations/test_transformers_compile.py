"""`torch.compile`: no graph break, the tokens of eager attention, plans shared by the layers of a compiled graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")


import torch._dynamo.testing
import transformers

import fa4_prefixlm.integrations.transformers as integration
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.integrations.transformers import compiled, masks
from fa4_prefixlm.integrations.transformers import layer_attention as attention_module
from tests.integrations.tiny_models import CACHE, NAME, NAMES, WITH_WINDOW, inputs, logits, model, text_model, types_of

LENGTH = 48
# Of torch itself, where dynamo traces the vmap that transformers makes some masks with.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    compiled._running.__dict__.clear()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_static_cache(name: str) -> None:
    """What generate() compiles: a decoding step. In one graph, that serves all of them."""
    made = model(name)
    types = types_of(name, [[(3, 17)], [(5, 33)]], 40)
    given = inputs(name, types)
    expected, found = [], []
    for attention, tokens in (("eager", expected), (NAME, found)):
        made.set_attn_implementation(attention)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        step = torch.compile(made.model.language_model, fullgraph=True, backend=counter)
        cache = transformers.StaticCache(config=made.config, max_cache_len=56)
        with torch.no_grad():
            new = made(**given, **{CACHE: cache}).logits[:, -1:].argmax(-1)
            for _ in range(8):
                embedded = made.get_input_embeddings()(new)
                masks = made.create_masks_for_generate(
                    made.config, embedded, attention_mask=torch.ones(2, 56), position_ids=None, **{CACHE: cache}
                )
                options: dict[str, Any] = {"inputs_embeds": embedded, "attention_mask": masks, CACHE: cache}
                if name == "gemma4":
                    options["per_layer_inputs"] = made.model.language_model.get_per_layer_inputs(new, None)
                hidden = step(**options).last_hidden_state
                new = made.lm_head(hidden).argmax(-1)
                tokens.append(new)
        assert counter.frame_count <= 2, "one graph, or one and one for a cache that is full"
    assert (torch.cat(found) == torch.cat(expected)).all()


def test_generate_compiles_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` by itself, with a compile configuration as on a GPU."""
    made = model("gemma3")
    given = inputs("gemma3", types_of("gemma3", [[(3, 17)]], 40))
    config = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    tokens = []
    for attention in ("eager", NAME):
        made.set_attn_implementation(attention)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        tokens.append(made.generate(**given, cache_implementation="static", compile_config=config, **options))
    assert (tokens[0] == tokens[1]).all()


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", ["gemma3", "paligemma2", "text"])
def test_prefill(name: str, pad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks are made inside of the graph too; its operation makes a plan for each kind of layer and shares it."""
    plans: list[Any] = []
    make = attention_module._make_plan
    monkeypatch.setattr(attention_module, "_make_plan", lambda *a: plans.append(make(*a)) or plans[-1])
    layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    made = text_model("gemma3_text", **layers) if name == "text" else model(name)
    run = torch.compile(made, fullgraph=True, backend="aot_eager")
    for images in ([[(3, 17), (20, 31)], [(5, 33)]], [[(1, 40)], []]):
        given = {"input_ids": torch.randint(6, 32, (2, LENGTH))}
        if name != "text":
            given = inputs(name, types_of(name, images, LENGTH))
        given["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
        if pad:
            given["attention_mask"][1, :7] = 0
        real = given["attention_mask"] == 1
        expected = logits(made, "eager", **given)
        made.set_attn_implementation(NAME)
        plans.clear()
        compiled._running.__dict__.clear()  # the masks of a text are those of the one before
        with torch.no_grad():
            found = run(**given, use_cache=False).logits
        close(found[real], expected[real])
        assert len(plans) == (2 if name in (*WITH_WINDOW, "text") else 1)


def test_gradients_in_a_graph() -> None:
    """SDPA runs what needs gradients: they are eager attention's."""
    made = model("gemma3").train()
    given = inputs("gemma3", types_of("gemma3", [[(3, 17), (20, 31)]], LENGTH)) | {"use_cache": False}
    grads = []
    for attention in ("eager", NAME):
        made.set_attn_implementation(attention)
        made.zero_grad()
        run = made if attention == "eager" else torch.compile(made, fullgraph=True, backend="aot_eager")
        run(**given).logits.square().mean().backward()
        grads.append(made.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone())
    close(grads[1], grads[0])


def test_another_forward_in_the_same_memory() -> None:
    """A graph may give a new mask the address of the last one: its first layer makes a plan of its own."""
    q = torch.randn(1, 20, 2, 8)
    bounds = torch.zeros(1, 1, 20, 2, dtype=torch.int32)
    bounds[..., 1] = torch.arange(1, 21)
    call = (None, 0.0, None)
    for _ in range(2):
        first = torch.ops.fa4_prefixlm.bounded_attention(q, q, q, bounds, *call)
        close(torch.ops.fa4_prefixlm.bounded_attention(q, q, q, bounds, *call), first)
        with torch.no_grad():
            seen = integration.masks.visible(bounds, 20)
        expected = torch.nn.functional.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3, attn_mask=seen)
        close(first.transpose(1, 2), expected)
        bounds.copy_(torch.tensor([0, 20], dtype=torch.int32).expand_as(bounds))


def test_more_runs_than_bounds_hold_in_a_graph() -> None:
    made = model("molmo2", NAME)
    images = [[(start, start + 4) for start in range(2, 46, 8)]]
    given = inputs("molmo2", types_of("molmo2", images, LENGTH))
    given["inputs_embeds"] = made.get_input_embeddings()(given.pop("input_ids"))
    given.pop("mm_encoder_outputs")
    compiled_model = torch.compile(made.model, fullgraph=True, backend="aot_eager")
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), pytest.raises(InputError, match="run this batch without torch.compile"):
            compiled_model(**given, use_cache=False)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_layers_that_are_compiled_get_masks_that_are_not(backend: str, gradients: bool) -> None:
    """Of which rows see several runs of keys: two images of Molmo 2, a hole in the padding."""
    for name, images, hole in (("molmo2", [[(3, 12), (20, 30)]], False), ("gemma3", [[(3, 12)]], True)):
        made = model(name, NAME)
        given = inputs(name, types_of(name, images, LENGTH))
        if hole:
            given["attention_mask"] = torch.ones(1, LENGTH, dtype=torch.long)
            given["attention_mask"][:, 17:23] = 0
        made.set_attn_implementation("eager")
        real = given.get("attention_mask", torch.ones(1, LENGTH)) == 1
        with torch.no_grad():
            wanted = made(**copy.deepcopy(given), use_cache=False).logits[real]
        made.set_attn_implementation(NAME)
        made.model.language_model.compile(backend=backend)
        for _ in range(2):  # another forward has another mask of the same values
            with torch.set_grad_enabled(gradients):
                close(made(**copy.deepcopy(given), use_cache=False).logits[real], wanted)


def test_a_plan_is_of_the_values_of_a_mask() -> None:
    """Not of the memory that a graph used again, nor of where layers stand; and copies of a mask share one."""
    bounds = masks.mask(1, 40, 40)
    assert bounds is not None
    causal = bounds.clone()
    first = compiled._kept(bounds, 40)
    assert compiled._kept(causal, 40) is first
    assert compiled._kept(causal, 41) is not first
    bounds[..., 1] -= (torch.arange(40, dtype=torch.int32) > 20).int()  # rows past 20 do not see themselves
    other = compiled._kept(bounds, 40)
    assert other is not first
    assert torch.equal(other.record.as_dense(), masks.visible(bounds, 40))
    assert torch.equal(first.record.as_dense(), masks.visible(causal, 40))
    bounds.zero_()
    assert torch.equal(compiled._kept(causal, 40).record.as_dense(), masks.visible(causal, 40))
    for end in range(1, 20):
        bounds[..., 1] = end
        compiled._kept(bounds, 40)
    assert len(compiled._running.masks) == compiled._KINDS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kinds", [["chunked_attention", "full_attention"] * 2, ["full_attention"] * 2])
def test_inductor_gives_masks_of_other_layers_the_same_memory(kinds: list[str]) -> None:
    """Llama 4: two kinds of layers, neither of which has a window of its own."""
    sizes = {"num_local_experts": 2, "intermediate_size_mlp": 32, "num_hidden_layers": len(kinds)}
    made = text_model("llama4_text", attention_chunk_size=8, layer_types=kinds, **sizes)
    ids = torch.randint(6, 32, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones(2, LENGTH, dtype=torch.long), "use_cache": False}
    with torch.no_grad():
        expected = made(**given).logits
        made.set_attn_implementation(NAME)
        run = torch.compile(made, backend="inductor")
        for _ in range(2):
            close(run(**given).logits, expected)
