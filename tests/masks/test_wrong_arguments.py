"""What is wrong is refused by name: every public function of masks and of the models' masks, every argument."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm import masks
from fa4_prefixlm.masks import models

TYPES = torch.tensor([[0, 1, 1, 0, 1]])


def triangle(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return q >= kv


# An argument that works, by its name.
GOOD: dict[str, Any] = {
    "actions": 2,
    "attention_mask": torch.ones_like(TYPES),
    "aux_tensors": (),
    "batch": 2,
    "before": 0,
    "block": 4,
    "canvas": False,
    "clamp": True,
    "cu_seqlens": None,
    "decoder_lengths": [4],
    "device": "cpu",
    "encoder_lengths": [3],
    "first": "noised",
    "frame": 2,
    "gaps": True,
    "input_lengths": [1, 2],
    "joined": False,
    "left": 3,
    "lengths": [3, 4],
    "levels": 3,
    "like": "transformers",
    "local_attention": 4,
    "mask": masks.causal,
    "mask_mod": triangle,
    "max_intervals": 3,
    "max_spans": 3,
    "merge": True,
    "name": "image",
    "padding": False,
    "position": 5,
    "ranges": [(1, 3)],
    "right": 2,
    "seqlen": 8,
    "seqlen_q": 4,
    "sliding_window": 5,
    "spans": [[(0, 3)]],
    "token_types": TYPES,
    "tokens": 3,
    "trees": [[(None, 3), (0, 2)]],
    "twin": triangle,
    "values": {1},
    "version": 1,
    "window": 3,
}
LIKE = {"diffusion_gemma": "transformers-generate", "gemma4.unified": "transformers-forward"}
PACKED = {"token_types": TYPES[0], "attention_mask": torch.ones(5), "cu_seqlens": [0, 2, 5]}
BAD: list[Any] = [
    None,
    "a",
    b"x",
    1.5,
    float("nan"),
    1j,
    -1,
    True,
    object(),
    {"a"},
    {None},
    {"image": 3},
    {"image": [("a", 1)]},
    [None],
    ["ab"],
    [1.5],
    [[1.5]],
    [[None]],
    [(1,)],
    [[(1,)]],
    [[("a", 2)]],
    [[(None, None)]],
    [[(3, 1)]],
    torch.tensor(2),
    torch.zeros(3),
    torch.tensor([1, 2]),
    torch.ones(1, 7, dtype=torch.long),
    torch.zeros(2, 3, 4),
]


def public_functions() -> dict[str, Callable[..., Any]]:
    """By name, as a user writes it."""
    found: dict[str, Callable[..., Any]] = {"safe_chunk_end": fp.safe_chunk_end, "PrefixLM": masks.PrefixLM}
    joined = masks.causal | masks.same_span()
    found |= {"dense": joined.dense, "show": lambda **rest: repr(joined.show(**rest)), "flex": joined.flex}
    found["show"].__signature__ = inspect.signature(joined.show)  # type: ignore[attr-defined]
    for name in masks.__all__:
        own = getattr(masks, name)
        if isinstance(own, types.FunctionType):
            found[name] = own
        elif isinstance(own, types.ModuleType):
            listed = getattr(own, "__all__", vars(own))
            for each in (function for function in listed if not function.startswith("_")):
                function = getattr(own, each)
                if isinstance(function, types.FunctionType) and _is_of_a_family(function):
                    found[f"{name}.{each}"] = function
    return found


def _is_of_a_family(function: types.FunctionType) -> bool:
    """Not what the families share, nor an atom that they use."""
    above, _, file = function.__module__.rpartition(".")
    return above == models.__name__ and not file.startswith("_")


FUNCTIONS = public_functions()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_checked(name: str) -> None:
    function = FUNCTIONS[name]
    good = {own: GOOD[own] for own in inspect.signature(function).parameters}
    if name == "flex":
        good["ranges"] = [[(1, 3)]]
    for beginning, like in LIKE.items():
        if "like" in good and name.startswith(beginning):
            good["like"] = like
    calls = [good]
    if "cu_seqlens" in good:
        packed = {**good, **{own: value for own, value in PACKED.items() if own in good}}
        calls += [packed, {**packed, "cu_seqlens": torch.tensor([0, 2, 5])}]
        calls += [{**call, "max_spans": None} for call in calls if "max_spans" in call and name != "runs_on_device"]
    for call in calls:
        function(**call)
        for own in call:
            for bad in BAD:
                try:
                    function(**{**call, own: bad})
                except fp.InputError as error:
                    assert error.argument, error  # noqa: PT017 (not every bad value is bad for every argument)
                except Exception as error:
                    pytest.fail(f"{name}({own}={bad!r}): {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks.noised_and_clean(None), r"lengths: expected a list of integers, got None \(NoneType\)"),
        (lambda: masks.noised_and_clean({3, 4}), r"lengths: expected a list of integers, got \{3, 4\} \(set\)"),
        (lambda: masks.video.frames(None, 2), r"lengths: expected a list of integers, got None \(NoneType\)"),
        (lambda: masks.video.frames(torch.tensor(5), 2), r"lengths: expected a list of integers, got tensor\(5\)"),
        (lambda: masks.t5.spans_from_lengths(7), r"input_lengths: expected a list of integers, got 7 \(int\)"),
        (lambda: masks.t5gemma.merged_ranges([3], None), "decoder_lengths: expected a list of integers, got None"),
        (lambda: masks.runs_of(TYPES, {"a"}), r"values: expected integers, the token types, got \{'a'\}"),
        (lambda: masks.runs_of(TYPES, [1.5]), r"values: expected integers, the token types, got \[1.5\]"),
        (lambda: masks.runs_of(TYPES, b"a"), r"values: expected a collection of token types, .* got b'a' \(bytes\)"),
        (lambda: masks.runs_on_device(TYPES, {None}, max_spans=2), "values: expected integers, .* got {None}"),
        (lambda: masks.runs_of(TYPES, {1}, merge=TYPES), "merge: expected True or False, got tensor"),
        (lambda: masks.drop_longer(None, 3), r"spans: expected a list of spans per sequence, got None \(NoneType\)"),
        (lambda: masks.drop_longer([(0, 3)], 3), r"spans\[0\]\[0\]: expected a pair of integers .*per sequence"),
        (lambda: masks.drop_longer([[(1, 2.5)]], 3), r"spans\[0\]\[0\]: expected a pair of integers"),
        (lambda: masks.in_documents(masks.causal, ["a"]), r"name: expected the name of a span set, .* got \['a'\]"),
        (
            lambda: masks.from_cute(triangle, aux_tensors=TYPES, twin=triangle),
            r"aux_tensors: expected a list of tensors, got tensor.*\(Tensor\)",
        ),
        (
            lambda: masks.paligemma.spans_from_token_types([[0, 1]], attention_mask=TYPES),
            r"token_types: expected an integer tensor \(batch, seqlen\), got list",
        ),
        (
            lambda: masks.paligemma.spans_from_token_types(TYPES, attention_mask=[[1] * 5]),
            "attention_mask: expected a tensor of the shape of token_types, got list",
        ),
        (
            lambda: masks.paligemma.spans_from_token_types(TYPES, attention_mask=TYPES[0]),
            r"attention_mask: expected shape \(1, 5\), got \(5,\)",
        ),
        (lambda: masks.pi0.ranges(None, 2), r"attention_mask: expected a tensor \(batch, prefix\), got NoneType"),
        (lambda: masks.pi0.ranges(TYPES[0], 2), r"attention_mask: expected shape \(batch, prefix\), got \(5,\)"),
        (lambda: masks.pi0.expert_layers(padding=TYPES), "padding: expected True or False, got tensor"),
        (lambda: masks.t5gemma.encoder_local_layers(4, version=TYPES), "version: expected 1 or 2, got tensor"),
        (lambda: masks.causal.dense(seqlen=4, ranges=TYPES[0]), "ranges: expected None: causal reads no spans"),
        (
            lambda: masks.same_span().dense(seqlen=4, ranges=torch.tensor(1)),
            r"ranges\['image'\]\[0\]: expected a list of pairs \(start, end\), got 1",
        ),
    ],
)
def test_what_is_said(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(fp.InputError, match=f"(?s)^{message}"):
        call()


def test_what_is_still_taken() -> None:
    """Integers of other kinds than Python's."""
    spans = torch.tensor([[[1, 3], [4, 9], [0, 0]], [[0, 0], [0, 0], [0, 0]]], dtype=torch.int32)
    assert masks.drop_longer(spans, torch.tensor(3)) == [[(1, 3)], []]
    assert masks.drop_longer(((), [(2, 4)]), 2) == [[], [(2, 4)]]
    assert masks.runs_of(TYPES == 1, {True}) == masks.runs_of(TYPES, torch.tensor([1])) == [[(1, 3), (4, 5)]]
    assert masks.runs_of(TYPES - 1, {-1}) == [[(0, 1), (3, 4)]]
    assert masks.t5.spans_from_lengths(torch.tensor([5, 0])) == [[(0, 5)], []]
    frames = functools.partial(masks.video.frames, frame=2)
    assert frames(torch.tensor([3])) == frames((3,)) == frames(iter([3])) == [[(0, 2), (2, 3)]]
