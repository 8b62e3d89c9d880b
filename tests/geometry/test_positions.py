"""Positions are data: queries and keys may start anywhere, and the same code says what each row sees."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from fa4_prefixlm import Mask, PrefixLM
from fa4_prefixlm.backends.reference import dense_attention
from fa4_prefixlm.batch import lengths, ranges
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.geometry import intervals
from fa4_prefixlm.geometry.traits import traits
from fa4_prefixlm.masks import causal, key_in, one_block, prefix, window
from fa4_prefixlm.masks.dense import DensePairs, mask_rows

MASKS = [
    PrefixLM(),
    PrefixLM(20),
    PrefixLM(20, clamp=False),
    causal & (prefix("image") | window(9)),
    causal & (window(5) | key_in("image")),
    causal | one_block("image"),
]
SPANS = (((3, 30), (41, 60)), ((0, 17), (20, 25), (40, 44), (50, 52), (60, 63)))
WHOLE = (70, 64)


def shard(rng: random.Random) -> lengths.Lengths:
    """Some queries and some keys of two sequences, by the positions where they start."""
    starts, seqlens = [], []
    for whole in WHOLE:
        first_q, first_k = rng.randint(0, whole - 1), rng.randint(0, whole - 1)
        starts.append((first_q, first_k))
        seqlens.append((rng.randint(0, whole - first_q), rng.randint(0, whole - first_k)))
    cu_q, cu_k = (torch.tensor([0, *own]).cumsum(0).int() for own in zip(*seqlens, strict=True))
    made = lengths.packed(
        cu_q,
        cu_k,
        total_q=int(cu_q[-1]),
        total_k=int(cu_k[-1]),
        max_seqlen_q=None,
        max_seqlen_k=None,
        device=torch.device("cpu"),
        more_queries=True,
    )
    query_start, key_start = (torch.tensor(own, dtype=torch.int32) for own in zip(*starts, strict=True))
    return dataclasses.replace(made, query_start=query_start, key_start=key_start)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_bounds_and_tags_are_the_dense_mask(mask: Mask) -> None:
    whole = lengths.batched(2, max(WHOLE), max(WHOLE), torch.device("cpu"))
    spans = ranges.parse(mask, {name: SPANS for name in mask.names}, whole)
    rng = random.Random(str(mask))
    for _ in range(30):
        sizes = shard(rng)
        where = intervals.tokens(sizes)
        bounds = intervals.row_bounds(mask, spans, sizes, where)
        assert traits(mask, spans, sizes).causal_only is None, "kernels mean bottom-right alignment by causal"
        row = key = 0
        for index, (rows, keys) in enumerate(zip(*sizes.on_host(), strict=True)):
            first_q, first_k = (own[index] for own in sizes.starts_on_host())
            position = torch.arange(first_q, first_q + rows)
            assert torch.equal(where.position[row : row + rows].long(), position)
            own = {name: SPANS[index] for name in mask.names}
            wanted = mask_rows(mask, DensePairs(position, keys, own, index, first_k))
            kv = torch.arange(keys)
            lo, hi = bounds.lo[row : row + rows, :, None], bounds.hi[row : row + rows, :, None]
            seen = ((kv >= lo) & (kv < hi)).any(1)
            if bounds.tags is not None:
                tags = bounds.tags.row_tag[row : row + rows, None] == bounds.tags.key_tag[None, key : key + keys]
                seen |= tags
            assert torch.equal(seen, wanted)
            row, key = row + rows, key + keys


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_shards_of_the_keys_merge_to_the_whole(mask: Mask) -> None:
    """As ring attention does: every shard of keys by itself, merged by LSE in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(70, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    spans = {name: (SPANS[0],) for name in mask.names}
    given = {"mask": mask, "spans": spans, "options": Options(0.35), "accumulate": torch.float64}
    exact, exact_lse = dense_attention(q, k, v, seqlens=((70,), (70,)), **given)
    out, lse = torch.zeros_like(exact), torch.full_like(exact_lse, -torch.inf)
    for begin, end in ((0, 20), (20, 33), (33, 33), (33, 70)):
        seqlens, starts = ((70,), (end - begin,)), ((0,), (begin,))
        part, part_lse = dense_attention(q, k[begin:end], v[begin:end], seqlens=seqlens, starts=starts, **given)
        total = torch.logaddexp(lse, part_lse)
        old, new = (torch.exp(own - total).nan_to_num(0.0).T[..., None] for own in (lse, part_lse))
        out, lse = out * old + part * new, total
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)


def test_bottom_right_is_the_default() -> None:
    sizes = lengths.packed(
        [0, 3, 4], [0, 5, 12], total_q=4, total_k=12, max_seqlen_q=None, max_seqlen_k=None, device=torch.device("cpu")
    )
    assert sizes.is_bottom_right
    assert sizes.query_starts().tolist() == [lengths.first_query(3, 5), lengths.first_query(1, 7)] == [2, 6]
    assert sizes.key_starts().tolist() == [0, 0]
    assert sizes.starts_on_host() == ((2, 6), (0, 0))
    assert intervals.tokens(sizes).position.tolist() == [2, 3, 4, 6]
    trimmed = dataclasses.replace(sizes, key_start=torch.tensor([1, 4], dtype=torch.int32))
    assert trimmed.starts_on_host() == ((3, 10), (1, 4))
    assert trimmed.query_starts().tolist() == [3, 10]
