"""Random and ugly batches, and a brute-force mask that shares no code with the library's bounds."""

from __future__ import annotations

import dataclasses
import itertools
import random

import torch

from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.prefix_lm import PrefixLM
from fa4_prefixlm.testing.pages import ShuffledPages, shuffled_pages

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

    def in_pages(self, k: torch.Tensor, v: torch.Tensor, page_size: int, seed: int | str) -> ShuffledPages:
        """Its keys and values `(total_k, heads, head_dim)`, in pages."""
        return shuffled_pages(k, v, self.as_seqlens[1], page_size, seed=seed)

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


def mixed_batch(rng: random.Random) -> Batch:
    """Image prefill, text prefill, chunks after a cache, decode rows; spans behind and ahead of the chunk."""
    seqlens, spans = [], []
    for _ in range(rng.randint(3, 7)):
        keys = rng.choice(EDGES) if rng.random() < 0.3 else rng.randint(2, 1500)
        kind = rng.choice(["image", "text", "chunk", "decode"])
        rows = {"image": keys, "text": keys, "chunk": rng.randint(1, keys), "decode": 1}[kind]
        own = random_spans(rng, keys) if kind in ("image", "chunk") else ()
        if kind == "decode":
            own = tuple(span for span in random_spans(rng, keys) if span[1] < keys)
        seqlens.append((rows, keys))
        spans.append((*own, (keys + 5, keys + 90)) if rng.random() < 0.5 else own)
    return Batch(tuple(seqlens), tuple(spans))


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


def masks_for(batch: Batch) -> list[Mask]:
    longest = max((end - start for own in batch.spans for start, end in own), default=1)
    shorter = max(1, longest // 2)
    return [PrefixLM(), PrefixLM(shorter), PrefixLM(shorter, clamp=False), PrefixLM(longest + 10)]


def _cumulative(values: list[int]) -> list[int]:
    result = [0]
    for value in values:
        result.append(result[-1] + value)
    return result
