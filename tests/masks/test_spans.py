"""Spans from token types."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.models import paligemma
from fa4_prefixlm.masks.spans import runs_of
from tests.masks.models.token_types import random_types


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
