"""Models, requests and steps as vLLM has them."""

from __future__ import annotations

import dataclasses
import random

import torch

import fa4_prefixlm as fp
from fa4_prefixlm.integrations.vllm import (
    GroupPlans,
    layer_mask,
)
from fa4_prefixlm.testing.accuracy import exact_attention

UPSTREAM = "flash_attn.cute"
NULL_BLOCK = 0


@dataclasses.dataclass(frozen=True)
class Model:
    """A layer of a model in vLLM. clamp: the model's and the layer's `mm_prefix_clamp_sliding_window`."""

    window: int | None  # the layer's
    model_window: int | None
    clamp: bool = False
    prefix_lm: bool = True

    def mask(self) -> fp.Mask:
        return layer_mask(self.window, clamp=self.clamp, prefix_lm=self.prefix_lm)


MODELS = {
    "gemma3 local": Model(24, 24),
    "gemma3 global": Model(None, 24),
    "gemma4 local": Model(24, 24, clamp=True),
    "gemma4 global": Model(None, 24, clamp=True, prefix_lm=False),
    "paligemma": Model(None, None),
    "a window of one token": Model(1, 1, clamp=True),
    "text model": Model(24, 24, prefix_lm=False),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """`rows` tokens of this step after `context` ones. ranges: inclusive, of all of the prompt."""

    context: int
    rows: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def keys(self) -> int:
        return self.context + self.rows

    @property
    def decoding(self) -> bool:
        """Past the prompt: only there may the host's lengths be too large."""
        return self.rows == 1 and all(end < self.context for _, end in self.ranges)

    def kept(self, model: Model) -> list[tuple[int, int]]:
        """The ranges that vLLM's runner makes for the model."""
        longest = None if model.clamp else model.model_window
        return [own for own in self.ranges if longest is None or own[1] - own[0] + 1 <= longest]

    def spans(self, model: Model) -> tuple[tuple[int, int], ...]:
        """The same, half-open, of more than one token."""
        return tuple((start, end + 1) for start, end in self.kept(model) if start < end)


def random_request(rng: random.Random, longest: int = 120) -> Request:
    ranges, at = [], rng.randint(0, 4)
    while at < longest:
        tokens = rng.choice([1, 2, 8, 23, 24, 25, 40])
        ranges.append((at, at + tokens - 1))
        at += tokens + rng.choice([0, 0, 1, 5, 30])
    prompt = ranges[-1][1] + 1 + rng.randint(0, 10)
    if rng.random() < 0.3:  # decoding
        return Request(prompt + rng.randint(0, 20), 1, tuple(ranges))
    cuts = [0, *(end for end in range(1, prompt) if not any(start < end <= stop for start, stop in ranges)), prompt]
    end = rng.choice(cuts[1:])
    context = rng.randint(0, end - 1)  # a hit in the prefix cache may end inside of an image
    return Request(context, end - context, tuple(rng.sample(ranges, len(ranges))))


def sees(p: int, kv: int, ranges: list[tuple[int, int]], model: Model) -> bool:
    """`v1/attention/backends/flash_attn.py`, pair by pair: the query's own range, (-1, -1) outside of all."""
    in_window = model.window is None or p - kv < model.window
    start, end = next(((s, e) for s, e in ranges if s < e and s <= p <= e and model.prefix_lm), (-1, -1))
    in_range = start <= kv <= end and (in_window or not model.clamp)
    return (kv <= p and in_window) or in_range


def brute_mask(request: Request, model: Model) -> torch.Tensor:
    ranges = request.kept(model)
    rows = range(request.context, request.keys)
    return torch.tensor([[sees(p, kv, ranges, model) for kv in range(request.keys)] for p in rows])


def starts_of(requests: list[Request]) -> list[int]:
    starts = [0]
    for request in requests:
        starts.append(starts[-1] + request.rows)
    return starts


@dataclasses.dataclass
class Step:
    """One batch in vLLM's form: a padded batch, a wide block table, the cache of one layer, and what it holds.

    k, v: packed, all keys of each request. cache: `(blocks, kv_heads, block_size, 2 * head_dim)`, tokens outermost.
    """

    requests: list[Request]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache: torch.Tensor
    metadata: dict[str, object]

    @property
    def total(self) -> int:
        return sum(request.rows for request in self.requests)

    @classmethod
    def of(cls, requests: list[Request], shape: Shape, model_window: int | None, rng: random.Random) -> Step:
        generator = torch.Generator(shape.device).manual_seed(rng.randint(0, 2**30))

        def normal(rows: int, heads: int) -> torch.Tensor:
            size = (rows, heads, shape.head_dim)
            return torch.randn(size, generator=generator, device=shape.device, dtype=torch.float32).to(shape.dtype)

        total, keys = sum(request.rows for request in requests), sum(request.keys for request in requests)
        padded, extra = rng.randint(0, 5), rng.randint(0, 2)
        q, k, v = normal(total + padded, shape.heads[0]), normal(keys, shape.heads[1]), normal(keys, shape.heads[1])
        counts = [-(-request.keys // shape.block_size) for request in requests]
        blocks = rng.sample(range(1, sum(counts) + 9), sum(counts))  # block 0 is vLLM's null block
        cache = torch.full((sum(counts) + 9, shape.block_size, shape.heads[1], 2 * shape.head_dim), 999.0)
        cache = cache.to(device=shape.device, dtype=shape.dtype)
        wide = torch.full((len(requests) + extra, shape.max_blocks + 7), NULL_BLOCK, dtype=torch.int32)
        row = 0
        for index, (request, count) in enumerate(zip(requests, counts, strict=True)):
            own, blocks = blocks[:count], blocks[count:]
            table = torch.tensor(own, dtype=torch.long)
            held = torch.zeros(count * shape.block_size, *cache.shape[2:]).to(cache)
            held[: request.keys] = torch.cat([k, v], dim=2)[row : row + request.keys]
            cache[table.to(shape.device)] = held.unflatten(0, (count, shape.block_size))
            if model_window is not None:  # blocks that slid out of every row's window
                table[: max(0, request.context - model_window + 1) // shape.block_size] = NULL_BLOCK
            wide[index, :count] = table
            row += request.keys
        starts = starts_of(requests) + [total] * extra
        seq_lens = [request.keys for request in requests] + [0] * extra
        starts_cpu, seq_lens_cpu = (torch.tensor(values, dtype=torch.int32) for values in (starts, seq_lens))
        metadata = {
            "query_start_loc": starts_cpu.to(shape.device),
            "seq_lens": seq_lens_cpu.to(shape.device),
            "block_table": wide.to(shape.device)[:, : shape.max_blocks + 3],
            "query_start_loc_cpu": starts_cpu,
            # With speculative decoding and asynchronous scheduling, the host's lengths are upper bounds there.
            "seq_lens_cpu": seq_lens_cpu + torch.tensor([2 * own.decoding for own in requests] + [0] * extra),
        }
        return cls(requests, q, k, v, cache.transpose(1, 2), metadata)

    def mm_ranges(self, model: Model) -> dict[int, list[tuple[int, int]]]:
        return {index: request.kept(model) for index, request in enumerate(self.requests)}

    def exact(self, model: Model, options: object = None) -> torch.Tensor:
        seqlens = tuple(request.rows for request in self.requests), tuple(request.keys for request in self.requests)
        mask = model.mask()
        spans = tuple(request.spans(model) for request in self.requests) if mask.names else None
        return exact_attention(
            self.q[: self.total], self.k, self.v, mask=mask, spans=spans, seqlens=seqlens, options=options
        )[0]


@dataclasses.dataclass(frozen=True)
class Shape:
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    block_size: int = 16
    max_blocks: int = 14
    max_tokens: int = 700
    max_requests: int = 8
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def plans(self, layers: dict[str, fp.Mask], build: str | None = None, **changed: int) -> GroupPlans:
        sizes = {
            "max_tokens": self.max_tokens,
            "max_requests": self.max_requests,
            "max_blocks": self.max_blocks,
            "block_size": self.block_size,
            "num_heads": self.heads[0],
            "num_kv_heads": self.heads[1],
            "head_dim": self.head_dim,
        }
        return GroupPlans(layers, dtype=self.dtype, device=self.device, build=build, **{**sizes, **changed})


def run_layer(plans: GroupPlans, layer: str, step: Step, **options: object) -> torch.Tensor:
    out = torch.full_like(step.q, 7.0)
    assert plans.attention(layer, step.q, step.cache, out, **options) is out
    assert (out[step.total :] == 7.0).all(), "rows past the batch were written"
    return out[: step.total]
