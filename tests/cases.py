"""Random and ugly batches, and a brute-force mask that shares no code with the library's bounds."""

from __future__ import annotations

import dataclasses
import itertools
import random

import torch

from fa4_prefixlm import Mask, PrefixLM
from fa4_prefixlm.batch import lengths, ranges
from fa4_prefixlm.geometry import intervals
from fa4_prefixlm.geometry.traits import Traits, traits
from fa4_prefixlm.masks.protocols import Pairs, Rows

EDGES = (1, 2, 63, 64, 65, 79, 80, 81, 127, 128, 129, 191, 192, 193, 255, 256, 257, 383, 384, 385)


@dataclasses.dataclass(frozen=True)
class Batch:
    """seqlens: (queries, keys) of each sequence; spans: per sequence, half-open key positions."""

    seqlens: tuple[tuple[int, int], ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def cu_q(self) -> list[int]:
        return _cumulative([rows for rows, _ in self.seqlens])

    @property
    def cu_k(self) -> list[int]:
        return _cumulative([keys for _, keys in self.seqlens])

    @property
    def as_seqlens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(rows for rows, _ in self.seqlens), tuple(keys for _, keys in self.seqlens)

    def ranges_tensor(self) -> torch.Tensor:
        width = max((len(own) for own in self.spans), default=0) + 1  # always at least one unused row
        rows = [list(own) + [(0, 0)] * (width - len(own)) for own in self.spans]
        return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), width, 2)

    def tensors(
        self, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, device: str, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(total: int, head_count: int, dim: int) -> torch.Tensor:
            return torch.randn(total, head_count, dim, generator=generator, device=device, dtype=torch.float32).to(
                dtype
            )

        total_q, total_k = self.cu_q[-1], self.cu_k[-1]
        return (
            normal(total_q, heads[0], dims[0]),
            normal(total_k, heads[1], dims[0]),
            normal(total_k, heads[1], dims[1]),
        )


def brute_mask(mask: PrefixLM, rows: int, keys: int, spans: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """`(rows, keys)` bool by a double loop over positions, in plain Python."""
    result = torch.zeros(rows, keys, dtype=torch.bool)
    for row in range(rows):
        p = row + keys - rows
        for kv in range(keys):
            joined = any(start <= p < end and start <= kv < end for start, end in spans)
            causal = kv <= p
            near = mask.window is None or p - kv < mask.window
            result[row, kv] = ((causal or joined) and near) if mask.clamp else ((causal and near) or joined)
    return result


def random_spans(rng: random.Random, keys: int) -> tuple[tuple[int, int], ...]:
    """Disjoint spans; often adjacent, at a border, of one token, or all of the sequence."""
    style = rng.random()
    if keys == 0 or style < 0.1:
        return ()
    if style < 0.2:
        return ((0, keys),)
    cuts = sorted(rng.sample(range(keys + 1), min(keys + 1, rng.randint(2, 9))))
    if rng.random() < 0.3:
        cuts[0] = 0
    if rng.random() < 0.3:
        cuts[-1] = keys
    spans = [pair for pair in itertools.pairwise(cuts) if pair[0] < pair[1] and rng.random() < 0.7]
    rng.shuffle(spans)
    return tuple(spans)


def random_batch(rng: random.Random, longest: int = 700, empty: bool = True) -> Batch:
    seqlens = []
    for _ in range(rng.randint(1, 5)):
        keys = min(rng.choice(EDGES) if rng.random() < 0.5 else rng.randint(1, longest), longest)
        rows = keys if rng.random() < 0.6 else rng.randint(1, keys)
        if empty and rng.random() < 0.1:
            rows = 0
            keys = rng.choice([0, keys])
        seqlens.append((rows, keys))
    if not any(rows for rows, _ in seqlens):
        seqlens.append((5, 9))
    return Batch(tuple(seqlens), tuple(random_spans(rng, keys) for _, keys in seqlens))


def random_mask(rng: random.Random) -> PrefixLM:
    window = rng.choice([None, 1, 2, 17, 64, 100, 128, 129, 256, 1000])
    return PrefixLM(window=window, clamp=rng.random() < 0.5)


UGLY = {
    "one token": Batch(((1, 1),), (((0, 1),),)),
    "one token, no span": Batch(((1, 1),), ((),)),
    "one query after a cache": Batch(((1, 300),), (((40, 299),),)),
    "empty sequences around": Batch(
        ((0, 0), (130, 130), (0, 40), (65, 65), (0, 0)), ((), ((0, 60),), (), ((60, 65),), ())
    ),
    "span at both borders": Batch(((257, 257),), (((0, 64), (200, 257)),)),
    "adjacent spans": Batch(((512, 512),), (((0, 128), (128, 256), (256, 257), (257, 512)),)),
    "whole sequence": Batch(((385, 385), (128, 128)), (((0, 385),), ((0, 128),))),
    "span of one token": Batch(((200, 200),), (((0, 1), (100, 101), (199, 200)),)),
    "off the tile edge": Batch(((129, 129), (127, 127)), (((127, 129),), ((63, 127),))),
    "chunk inside a span": Batch(((100, 600), (64, 512)), (((450, 600),), ((440, 512),))),
    "many short sequences": Batch(((7, 7),) * 40, (((2, 5),),) * 40),
    "no spans": Batch(((300, 300), (1, 77)), ((), ())),
}


@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys and values of a batch in pages in random order, among pages of NaN that nobody may read.

    k, v: `(pages, page_size, heads, dim)`. table: `(batch, max_pages)` int32; entries past the last key are garbage.
    """

    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, k: torch.Tensor, v: torch.Tensor, page_size: int, seed: int) -> Pages:
        rng = random.Random(seed)
        counts = [-(-keys // page_size) for _, keys in batch.seqlens]
        order = list(range(sum(counts) + 5))
        rng.shuffle(order)
        table = torch.full((len(counts), max(1, *counts) + rng.randint(0, 3)), -(2**20), dtype=torch.int32)
        caches = [torch.full((len(order), page_size, *tensor.shape[1:]), float("nan")).to(tensor) for tensor in (k, v)]
        for index, count in enumerate(counts):
            own, order = order[:count], order[count:]
            table[index, :count] = torch.tensor(own, dtype=torch.int32)
            for cache, tensor in zip(caches, (k, v), strict=True):
                keys = tensor[batch.cu_k[index] : batch.cu_k[index + 1]]
                filled = torch.zeros(count * page_size, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
                filled[: len(keys)] = keys
                cache[torch.tensor(own, dtype=torch.long, device=tensor.device)] = filled.unflatten(0, (-1, page_size))
        return cls(*caches, table)


class Blind(PrefixLM):
    """PrefixLM, but the first 200 positions of a sequence and every third row after them see nothing."""

    no_empty_rows = False

    def intervals(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        lo, hi = super().intervals(rows)
        blind = ((rows.position < 200) | (rows.position % 3 == 0)).unsqueeze(1)
        return lo.masked_fill(blind, 5), hi.masked_fill(blind, 5)

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return super().visible(pairs) & (pairs.query >= 200) & (pairs.query % 3 != 0)


class ChainedBlind(Blind):
    """The same, with its tiles found from the extremes of each query tile's rows."""

    no_empty_rows = True


def masks_for(batch: Batch) -> list[Mask]:
    longest = max((end - start for own in batch.spans for start, end in own), default=1)
    shorter = max(1, longest // 2)
    return [PrefixLM(), PrefixLM(shorter), PrefixLM(shorter, clamp=False), PrefixLM(longest + 10)]


def sizes_of(batch: Batch) -> lengths.Lengths:
    totals = {"total_q": batch.cu_q[-1], "total_k": batch.cu_k[-1]}
    return lengths.packed(
        batch.cu_q, batch.cu_k, max_seqlen_q=None, max_seqlen_k=None, device=torch.device("cpu"), **totals
    )


@dataclasses.dataclass(frozen=True)
class Stages:
    """What a plan goes through, on the CPU."""

    sizes: lengths.Lengths
    spans: ranges.SpanSets
    traits: Traits
    where: intervals.Tokens
    bounds: intervals.Bounds


def prepare(batch: Batch, mask: Mask, spans: ranges.NamedRanges | None = None) -> Stages:
    sizes = sizes_of(batch)
    sets = ranges.parse(mask, batch.spans if spans is None else spans, sizes)
    where = intervals.tokens(sizes)
    return Stages(sizes, sets, traits(mask, sets, sizes), where, intervals.row_bounds(mask, sets, sizes, where))


def dense(bounds: intervals.Bounds, keys: int, rows: slice = slice(None)) -> torch.Tensor:
    """`(rows, keys)` bool of the intervals of rows that belong to one sequence."""
    kv = torch.arange(keys)
    return ((kv >= bounds.lo[rows, :, None]) & (kv < bounds.hi[rows, :, None])).any(1)


def _cumulative(values: list[int]) -> list[int]:
    result = [0]
    for value in values:
        result.append(result[-1] + value)
    return result
