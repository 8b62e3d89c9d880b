"""Spans from token types."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fa4_prefixlm as fp
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.models import gemma3, gemma4, molmo2, paligemma
from fa4_prefixlm.masks.spans import runs_of, runs_on_device
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
        (torch.zeros(4, dtype=torch.long), {1}, r"shape \(batch, seqlen\), or \(total,\) with cu_seqlens, got \(4,\)"),
        (torch.zeros(1, 4, dtype=torch.long), (), "values: expected at least one token type"),
    ],
)
def test_wrong_token_types(types: Any, values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runs_of(types, values)


def packed_types(rng: random.Random) -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
    """(types of all sequences and some padding, cu_seqlens, the types of each); sequences may be empty."""
    rows = [random_types(rng, rng.choice([0, 1, rng.randint(2, 40)]), (0, 1, 2)) for _ in range(rng.randint(1, 5))]
    cu = [0]
    for row in rows:
        cu.append(cu[-1] + len(row))
    padding = random_types(rng, rng.choice([0, 5]), (0, 1))
    flat = torch.tensor([kind for row in rows for kind in row] + padding, dtype=torch.long)
    return flat, cu, [torch.tensor([row], dtype=torch.long) for row in rows]


def as_lists(spans: torch.Tensor) -> list[list[tuple[int, int]]]:
    assert spans.dtype == torch.int32
    rows = [[(start, end) for start, end in own] for own in spans.tolist()]
    used = [[pair for pair in own if pair != (0, 0)] for own in rows]
    assert all(own[: len(kept)] == kept for own, kept in zip(rows, used, strict=True)), "unused rows come last"
    return used


@pytest.mark.parametrize("merge", [True, False])
def test_packed_runs_and_runs_on_the_device(merge: bool) -> None:
    """Packed or padded, as lists or as a tensor: the runs of each sequence alone."""
    rng = random.Random(merge)
    for _ in range(60):
        flat, cu, rows = packed_types(rng)
        wanted = [runs_of(row, {1, 2}, merge=merge)[0] for row in rows]
        most = max(1, *map(len, wanted)) + rng.choice([0, 3])
        for own in (cu, torch.tensor(cu, dtype=torch.int32), torch.tensor(cu)):
            assert runs_of(flat, {1, 2}, merge=merge, cu_seqlens=own) == wanted
            made = runs_on_device(flat, {1, 2}, max_spans=most, merge=merge, cu_seqlens=own)
            assert made.shape == (len(rows), most, 2)
            assert as_lists(made) == wanted
        for row, alone in zip(rows, wanted, strict=True):
            assert as_lists(runs_on_device(row, {1, 2}, max_spans=most, merge=merge)) == [alone]
    batch = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.uint8)
    assert as_lists(runs_on_device(batch, {1}, max_spans=2)) == runs_of(batch, {1}) == [[(0, 2)], [(0, 1), (2, 3)], []]
    assert as_lists(runs_on_device(batch.bool(), {1}, max_spans=2)) == runs_of(batch, {1})


def test_runs_that_touch_across_sequences_are_two() -> None:
    types = torch.ones(7, dtype=torch.int32)
    assert runs_of(types, {1}, cu_seqlens=[0, 3, 3, 5]) == [[(0, 3)], [], [(0, 2)]]
    assert as_lists(runs_on_device(types, {1}, max_spans=1, cu_seqlens=[0, 3, 3, 5])) == [[(0, 3)], [], [(0, 2)]]


def test_more_runs_than_max_spans() -> None:
    with pytest.raises(InputError, match="token_types: expected at most max_spans = 1 runs in a sequence, got 2"):
        runs_on_device(torch.tensor([[1, 0, 0], [1, 0, 1]]), {1}, max_spans=1)


def test_runs_on_the_device_look_at_no_value() -> None:
    """On fake tensors of a device a value that is looked at raises."""
    with FakeTensorMode():
        types, cu = (torch.empty(count, dtype=torch.int32, device="cuda:0") for count in (4096, 5))
        spans = runs_on_device(types, {1, 2}, max_spans=6, cu_seqlens=cu)
        assert spans.shape == (4, 6, 2)
        assert spans.device == types.device
        rows = torch.empty(3, 100, dtype=torch.long, device="cuda:0")
        assert gemma3.spans_from_token_types(rows, max_spans=2).shape == (3, 2, 2)


def test_the_models_read_packed_types() -> None:
    flat, cu, rows = packed_types(random.Random(5))
    for family, values in ((gemma3, {1}), (gemma4, {1, 2}), (molmo2, {1})):
        wanted = [runs_of(row, values)[0] for row in rows]
        assert family.spans_from_token_types(flat, cu_seqlens=cu) == wanted
        assert as_lists(family.spans_from_token_types(flat, cu_seqlens=cu, max_spans=20)) == wanted
    types, own = torch.tensor([0, 0, 1, 0, 1, 1, 0]), [0, 3, 7]
    assert paligemma.spans_from_token_types(types[:6], cu_seqlens=[0, 3, 6]) == [[(0, 2)], [(0, 1)]]
    assert as_lists(paligemma.spans_from_token_types(types[:6], cu_seqlens=[0, 3, 6], max_spans=9)) == [
        [(0, 2)],
        [(0, 1)],
    ]
    with pytest.raises(InputError, match="max_spans = 1"):
        paligemma.spans_from_token_types(types, cu_seqlens=own, max_spans=9)
    gaps = paligemma.spans_from_token_types(types, cu_seqlens=own, gaps=True, max_spans=2)
    assert as_lists(gaps) == [[(0, 2)], [(0, 1), (3, 4)]]
    real = torch.tensor([1, 1, 1, 1, 1, 1, 0])
    hidden = paligemma.spans_from_token_types(types, attention_mask=real, cu_seqlens=own, max_spans=1)
    assert as_lists(hidden) == [[(0, 2)], [(0, 1)]]


def test_a_plan_takes_the_tensor() -> None:
    flat, cu, _ = packed_types(random.Random(3))
    q = torch.randn(cu[-1], 2, 8)
    where = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    lists = fp.attention(q, q, q, runs_of(flat, {1}, cu_seqlens=cu), **where)
    on_device = runs_on_device(flat, {1}, max_spans=20, cu_seqlens=cu)
    assert torch.equal(fp.attention(q, q, q, on_device, **where), lists)


@pytest.mark.parametrize(
    ("types", "given", "message"),
    [
        (torch.zeros(2, 3).long(), {"cu_seqlens": [0, 3]}, r"token_types: expected shape \(total,\) with cu_seqlens"),
        (torch.zeros(6).long(), {"cu_seqlens": [0, 4, 3]}, "cu_seqlens: expected values that ascend from 0"),
        (torch.zeros(6).long(), {"cu_seqlens": [1, 4]}, "cu_seqlens: expected values that ascend from 0"),
        (torch.zeros(6).long(), {"cu_seqlens": []}, r"cu_seqlens: expected an int32 tensor or a list of batch \+ 1"),
        (torch.zeros(6).long(), {"cu_seqlens": torch.zeros(1, 2).int()}, r"cu_seqlens: expected shape \(batch \+ 1,\)"),
        (torch.zeros(6).long(), {"cu_seqlens": torch.zeros(2)}, "cu_seqlens: expected dtype"),
    ],
)
def test_wrong_packed_types(types: torch.Tensor, given: dict[str, Any], message: str) -> None:
    for call in (lambda: runs_of(types, {1}, **given), lambda: runs_on_device(types, {1}, max_spans=2, **given)):
        with pytest.raises(InputError, match=message):
            call()


def test_wrong_sizes() -> None:
    with pytest.raises(InputError, match=r"cu_seqlens\[-1\]: expected at most the 6 tokens of token_types, got 7"):
        runs_of(torch.zeros(6).long(), {1}, cu_seqlens=[0, 7])
    with pytest.raises(InputError, match="max_spans: expected a positive number of spans, got 0"):
        runs_on_device(torch.zeros(1, 6).long(), {1}, max_spans=0)


@pytest.mark.parametrize("read", [runs_of, functools.partial(runs_on_device, max_spans=2)])
def test_sequences_past_the_token_types(read) -> None:
    with pytest.raises(InputError, match=r"cu_seqlens\[-1\]: expected at most the 5 tokens of token_types, got 9"):
        read(torch.tensor([1, 1, 0, 1, 1]), {1}, cu_seqlens=[0, 3, 9])
