"""What only the device knows is asserted there, and held to what is refused on the host.

An assertion on the CPU raises at once, so lengths and spans that the host is not told of are looked at here.
"""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.batch import lengths, ranges
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.ranges import HostSpans, Spans, Whole
from tests.batch.bad_calls import cu

CPU = torch.device("cpu")
# Sequences of 4 and 6 queries on 5 and 7 keys, of which the host knows the totals alone.
UNKNOWN = Lengths(
    cu_seqlens_q=cu(0, 4, 10),
    cu_seqlens_k=cu(0, 5, 12),
    total_q=10,
    total_k=12,
    max_seqlen_q=6,
    max_seqlen_k=7,
    seqlens_q=None,
    seqlens_k=None,
    same=False,
)


def test_lengths_that_are_right() -> None:
    UNKNOWN.assert_valid()
    dataclasses.replace(UNKNOWN, cu_seqlens_q=cu(0, 5, 12), total_q=12, max_seqlen_q=7).assert_valid()
    dataclasses.replace(UNKNOWN, cu_seqlens_q=cu(0, 0, 6), cu_seqlens_k=cu(0, 5, 12), total_q=6).assert_valid()
    dataclasses.replace(UNKNOWN, cu_seqlens_k=cu(0, 3, 10), total_k=10, more_queries=True).assert_valid()
    dataclasses.replace(UNKNOWN, total_k=100, exact_total_k=False).assert_valid()


@pytest.mark.parametrize(
    "change",
    [
        {"cu_seqlens_q": cu(0, 7, 4, 10), "cu_seqlens_k": cu(0, 7, 7, 13), "total_k": 13, "max_seqlen_q": 7},
        {"cu_seqlens_q": cu(0, 3, 5, 10), "cu_seqlens_k": cu(0, 7, 5, 12), "more_queries": True},
        {"cu_seqlens_q": cu(0, 6, 10)},
        {"max_seqlen_q": 5},
        {"max_seqlen_k": 6},
        {"cu_seqlens_q": cu(1, 4, 10)},
        {"cu_seqlens_q": cu(0, 4, 9)},
        {"cu_seqlens_k": cu(1, 6, 12)},
        {"cu_seqlens_k": cu(0, 5, 11)},
        {"cu_seqlens_q": cu(0, 4, 9), "exact_total_k": False},
        {"cu_seqlens_k": cu(1, 6, 12), "exact_total_k": False},
    ],
    ids=[
        "queries descend",
        "keys descend",
        "more queries than keys",
        "above max_seqlen_q",
        "above max_seqlen_k",
        "queries begin past 0",
        "queries end before q",
        "keys begin past 0",
        "keys end before k",
        "queries end before q, keys in a cache",
        "keys begin past 0, keys in a cache",
    ],
)
def test_lengths_that_are_wrong(change: dict[str, object]) -> None:
    with pytest.raises(RuntimeError, match="lengths: not ascending from 0 to the tensor's length, or seqlen_q"):
        dataclasses.replace(UNKNOWN, **change).assert_valid()  # type: ignore[arg-type]


def sizes_of(rows: tuple[int, ...], keys: tuple[int, ...]) -> Lengths:
    ends = [torch.tensor([0, *own]).cumsum(0).int() for own in (rows, keys)]
    totals = {"total_q": sum(rows), "total_k": sum(keys), "max_seqlen_q": None, "max_seqlen_k": None}
    return lengths.packed(*ends, device=CPU, more_queries=True, **totals)


def said_on_device(spans: HostSpans, sizes: Lengths, whole: Whole, longest: int = 1000) -> str:
    """What the assertion says of spans (and unused rows) as they are in a tensor on the device, "" if they are fine."""
    width = max(map(len, spans), default=0)
    values = torch.tensor([[*own, *[(0, 0)] * (width - len(own))] for own in spans], dtype=torch.int32)
    try:
        ranges.assert_valid(Spans(values.view(len(spans), width, 2), None, longest, whole), sizes)
    except RuntimeError as error:
        return str(error)
    return ""


def fine_on_host(spans: HostSpans, sizes: Lengths, whole: Whole) -> bool:
    mask = SimpleNamespace(names=frozenset({"image"}), whole=lambda name: whole)
    try:
        ranges.parse(mask, [[span for span in own if span != (0, 0)] for own in spans], sizes)
    except fp.InputError:
        return False
    return True


WRONG = "ranges: a span is reversed, is cut by the end of its keys, or is longer than max_range"


@pytest.mark.parametrize(
    ("span", "said"),
    [((0, 5), ""), ((3, 3), WRONG), ((4, 2), WRONG), ((3, 0), WRONG), ((-1, 2), WRONG), ((0, -1), WRONG)],
)
def test_a_span(span: tuple[int, int], said: str) -> None:
    """Also beside another one, and in whatever order."""
    for spans in ([span], [(0, 0), span], [span, (6, 7)], [(6, 7), (0, 0), span]):
        assert said_on_device((tuple(spans),), sizes_of((8,), (8,)), "span") == said


@pytest.mark.parametrize(
    ("spans", "fine"),
    [
        ([(0, 3), (3, 5)], True),
        ([(3, 5), (0, 0), (0, 3)], True),
        ([(0, 4), (3, 5)], False),
        ([(3, 5), (0, 4)], False),
        ([(3, 5), (0, 0), (0, 4)], False),
        ([(2, 4), (2, 4)], False),
        ([(0, 8), (3, 5)], False),
    ],
)
def test_spans_that_touch_or_overlap(spans: list[tuple[int, int]], fine: bool) -> None:
    said = "" if fine else "ranges: two spans overlap"
    assert said_on_device((tuple(spans),), sizes_of((8,), (8,)), "span") == said
    assert said_on_device(((), tuple(spans)), sizes_of((8, 8), (8, 8)), "span") == said
    assert not said_on_device(((spans[0],), (spans[-1],)), sizes_of((8, 8), (8, 8)), "span")


@pytest.mark.parametrize(
    ("span", "whole", "said"),
    [
        ((1, 5), "span", ""),
        ((1, 6), "span", WRONG),
        ((8, 20), "span", ""),  # not prefilled yet: the chunk that has its keys checks it
        ((4, 10), "nothing", ""),  # what is here of it counts
        ((3, 10), "nothing", WRONG),
    ],
)
def test_max_range(span: tuple[int, int], whole: Whole, said: str) -> None:
    """Of four tokens, where there are eight keys."""
    assert said_on_device(((span,),), sizes_of((8,), (8,)), whole, longest=4) == said


def random_spans(rng: random.Random, keys: int) -> ranges.SequenceSpans:
    """Up to three, in any order, beside unused rows; some past the keys, or wrong."""
    positions = range(keys + 1 + rng.choice((0, 0, 5)))
    edges = sorted(rng.sample(positions, min(rng.choice((0, 2, 4, 6)), len(positions) // 2 * 2)))
    pairs = list(zip(edges[::2], edges[1::2], strict=True))
    if pairs and rng.random() < 0.3:
        pairs[0] = (pairs[0][0] + rng.randint(-1, 2), pairs[0][1] + rng.randint(-1, 2))
    pairs += [(0, 0)] * rng.randint(0, 1)
    rng.shuffle(pairs)
    return tuple(pairs)


@pytest.mark.parametrize("whole", ["nothing", "span", "block", "all"])
def test_spans_as_on_the_host(whole: Whole) -> None:
    """Of prompts, of chunks, of more queries than keys, and of sequences without queries, which miss no key."""
    rng = random.Random(whole)
    found = {False: 0, True: 0}
    for _ in range(600):
        keys = tuple(rng.randint(0, 12) for _ in range(rng.randint(1, 3)))
        rows = tuple(rng.choice((0, own, own + 2, rng.randint(0, own))) for own in keys)
        spans, sizes = tuple(random_spans(rng, own) for own in keys), sizes_of(rows, keys)
        fine = fine_on_host(spans, sizes, whole)
        assert (not said_on_device(spans, sizes, whole)) is fine, (rows, keys, spans)
        found[fine] += 1
    assert min(found.values()) > 60


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([(2, 5), (9, 12)], ""),  # before the chunk, whose first token is at 5
        ([(2, 6), (9, 12)], WRONG),
        ([(8, 12)], ""),
        ([(7, 12)], WRONG),
        ([(2, 6), (7, 8)], ""),
    ],
)
def test_one_block_of_all_spans(spans: list[tuple[int, int]], said: str) -> None:
    """Three queries on eight keys: a chunk that holds a token of the block holds all of it."""
    sizes = sizes_of((3,), (8,))
    assert said_on_device((tuple(spans),), sizes, "block") == said
    assert fine_on_host((tuple(spans),), sizes, "block") is not bool(said)
