"""The cases: batches, masks and kernels, chosen so that a wrong kernel shows. Their tensors are the same everywhere.

Several batches share a kernel, because compiling one takes 5 to 8 s and running it takes milliseconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fa4_prefixlm.batch.ranges import HostSpans
from fa4_prefixlm.masks import PrefixLM, causal, key_in, one_block, prefix, window
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.testing.pages import shuffled_pages

# Masks beyond PrefixLM, each of one span set.
MASKS: dict[str, Mask] = {
    "two intervals": causal & (prefix("image") | window(100)),
    "three intervals": causal & (window(60) | key_in("image")),
    "block of tags": causal | one_block("image"),
}


@dataclass(frozen=True)
class Case:
    """One batch under one mask, with what decides the kernel that runs it.

    level: "quick" or "full". seqlens_q, seqlens_k: tokens of each sequence; queries are the last of its positions.
    spans: per sequence, half-open key positions. mask: "prefix_lm" with `window` and `clamp`, or a name of `MASKS`.
    heads: (query, key) heads. dtype, sink: "bfloat16", "float16", "float32"; sink None is none.
    page_size: of keys in pages, None for contiguous ones. timed: its speed is reported too.
    """

    name: str
    level: str
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    spans: HostSpans
    window: int | None = None
    clamp: bool = True
    mask: str = "prefix_lm"
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 128
    head_dim_v: int = 128
    dtype: str = "bfloat16"
    softcap: float = 0.0
    sink: str | None = None
    page_size: int | None = None
    timed: bool = False

    @property
    def kernel(self) -> KernelKey:
        """What decides the generated code: cases with the same key share their kernels."""
        return KernelKey(
            dims=(self.head_dim, self.head_dim_v),
            windowed=self.window is not None,
            mask=self.mask,
            group=self.heads[0] // self.heads[1],
            dtype=self.dtype,
            softcap=self.softcap,
            sink=self.sink,
            page_size=self.page_size,
        )

    @property
    def attention_mask(self) -> Mask:
        return PrefixLM(self.window, self.clamp) if self.mask == "prefix_lm" else MASKS[self.mask]

    @property
    def causal_mask(self) -> PrefixLM:
        """What FA4's own causal call computes on the same tensors."""
        return PrefixLM(self.window)

    @property
    def no_spans(self) -> HostSpans:
        return ((),) * len(self.seqlens_q)

    @property
    def seqlens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.seqlens_q, self.seqlens_k

    @property
    def cu_seqlens_q(self) -> list[int]:
        return list(itertools.accumulate(self.seqlens_q, initial=0))

    @property
    def cu_seqlens_k(self) -> list[int]:
        return list(itertools.accumulate(self.seqlens_k, initial=0))


class KernelKey(NamedTuple):
    """What decides the generated code, see `Case.kernel`."""

    dims: tuple[int, int]
    windowed: bool
    mask: str
    group: int
    dtype: str
    softcap: float
    sink: str | None
    page_size: int | None


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, on a device.

    q: `(total_q, heads, head_dim)`. k, v: `(total_k, kv_heads, dim)`, contiguous, in the order of the sequences.
    sink: `(heads,)` or None. cache: k and v in pages, `(pages, page_size, kv_heads, dim)`, with the page table
    `(batch, max_pages)` int32 on the host; None without pages.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sink: torch.Tensor | None
    cache: tuple[torch.Tensor, torch.Tensor] | None
    table: torch.Tensor | None


def inputs(case: Case, device: torch.device) -> Inputs:
    """The tensors of a case: the same bits in every process, for every build and on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(getattr(torch, case.dtype)).to(device)

    total_q, total_k = sum(case.seqlens_q), sum(case.seqlens_k)
    q = normal(total_q, case.heads[0], case.head_dim)
    k, v = (normal(total_k, case.heads[1], dim) for dim in (case.head_dim, case.head_dim_v))
    sink = None
    if case.sink is not None:
        sink = torch.randn(case.heads[0], generator=generator).to(getattr(torch, case.sink)).to(device)
    if case.page_size is None:
        return Inputs(q, k, v, sink, None, None)
    pages = shuffled_pages(k, v, case.seqlens_k, case.page_size, seed=case.name)
    return Inputs(q, k, v, sink, pages.cache, pages.table)


def cases(*, full: bool = False, containing: str = "") -> list[Case]:
    """The quick cases, or all, whose name contains the text."""
    return [case for case in EVERY if (full or case.level == "quick") and containing in case.name]


# Ends of spans at and around multiples of the key tiles (64, 80, 112, 128) and of the query tiles (64, 128, 192).
_EDGES = (64, 80, 112, 128, 160, 192, 224, 240, 256, 320, 336, 384)


def _ending(offset: int) -> tuple[tuple[int, int], ...]:
    """Spans that end at the edges, moved by `offset`, each one token or more after the one before it."""
    begins = (2, *(edge + 3 for edge in _EDGES[:-1]))
    return tuple((begin, edge + offset) for begin, edge in zip(begins, _EDGES, strict=True))


class Sequences(NamedTuple):
    """What a case says of its sequences, see `Case`."""

    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    spans: HostSpans


def _whole(lengths: Sequence[int], spans: HostSpans) -> Sequences:
    """Sequences whose queries are all their positions."""
    return Sequences(tuple(lengths), tuple(lengths), spans)


BATCHES = {
    # Ends at, one before and one after each edge, and a sequence that ends there too.
    "tile edges": _whole((400, 385, 386), (_ending(0), _ending(-1), _ending(1))),
    # One token, nothing, queries for no one, a span over all, spans at both borders, adjacent ones, of one token.
    "borders": Sequences(
        (1, 0, 129, 0, 257, 200, 1, 300),
        (1, 0, 129, 40, 257, 200, 300, 300),
        (
            ((0, 1),),
            (),
            ((0, 129),),
            (),
            ((0, 64), (200, 257)),
            ((0, 1), (100, 101), (199, 200)),
            ((40, 299),),
            ((0, 128), (128, 256), (256, 257), (257, 300)),
        ),
    ),
    # Prefill in chunks, decode: spans before, across and after the first query, behind the window, to the last key.
    "chunks": Sequences(
        (100, 64, 1, 130, 77),
        (600, 512, 300, 330, 77),
        (((10, 90), (450, 600)), ((440, 512),), ((40, 299),), ((100, 130), (199, 203), (210, 329)), ((5, 70),)),
    ),
    # More spans than query tiles, and sequences that share one where the batch is packed.
    "many short": _whole(
        (500, *(7,) * 20, 300),
        (
            tuple((at, at + 5) for at in range(3, 490, 9)),
            *(((2, 5),),) * 20,
            tuple((at, at + 2) for at in range(0, 300, 3)),
        ),
    ),
    # Prompts: what masks of two intervals and more keep in sight.
    "prompts": Sequences((700, 100, 64, 1), (700, 450, 500, 300), (((0, 130),), ((0, 64),), ((0, 300),), ((0, 1),))),
    "many images": _whole((640, 300), (tuple((at, at + 17) for at in range(5, 600, 40)), ((0, 300),))),
}


def _images(lengths: Sequence[int]) -> Sequences:
    """An image of 256 tokens every 1280, as in the benchmarks."""
    return _whole(lengths, tuple(tuple((at, at + 256) for at in range(64, keys - 255, 1280)) for keys in lengths))


def _set(level: str, kernel: str, batches: Sequence[str], **options: object) -> list[Case]:
    """A case for each batch, all with the same kernel."""
    return [Case(f"{batch}, {kernel}", level, *BATCHES[batch], **options) for batch in batches]  # type: ignore[arg-type]


def _timed(level: str, lengths: Sequence[int], head_dim: int, window: int | None) -> Case:
    reach = "global" if window is None else f"window {window}"
    return Case(
        f"{len(lengths)} x {lengths[0]}, hd{head_dim} {reach}",
        level,
        *_images(lengths),
        window=window,
        heads=(16, 8),
        head_dim=head_dim,
        head_dim_v=head_dim,
        timed=True,
    )


def _dims(head_dim: int, head_dim_v: int | None = None) -> dict[str, int]:
    return {"head_dim": head_dim, "head_dim_v": head_dim if head_dim_v is None else head_dim_v}


ALL = ("borders", "tile edges", "chunks", "many short")
_OPTIONS: dict[str, object] = {"softcap": 30.0, "sink": "bfloat16", "window": 90}

EVERY: tuple[Case, ...] = (
    # A kernel a line.
    *_set("quick", "hd128", ALL),
    *_set("quick", "hd128 window 40", ("tile edges", "chunks"), window=40),
    *_set("quick", "hd128 window 30 joined", ("tile edges", "chunks"), window=30, clamp=False),  # the same kernel
    *_set("quick", "hd256", ("borders", "tile edges", "chunks"), **_dims(256)),
    *_set("quick", "hd256 window 50", ("tile edges", "chunks"), window=50, **_dims(256)),
    *_set("quick", "hd64 6:2 softcap", ("tile edges", "chunks"), heads=(6, 2), softcap=30.0, **_dims(64)),
    *_set("quick", "hd128 8:1 sink pages 16", ("tile edges", "chunks"), heads=(8, 1), sink="float32", page_size=16),
    *_set("quick", "hd128 fp16 pages 128", ("tile edges", "chunks"), dtype="float16", page_size=128),
    *_set("quick", "hd128 two intervals", ("prompts",), mask="two intervals"),
    _timed("quick", (4096, 4096), 128, 1024),
    _timed("quick", (4096, 4096), 256, 1024),
    *_set("full", "hd64", ALL, **_dims(64)),
    *_set("full", "hd96", ("borders", "chunks"), **_dims(96)),
    *_set("full", "hd192-128", ALL, heads=(4, 4), **_dims(192, 128)),
    *_set("full", "hd192", ("tile edges", "chunks"), **_dims(192)),
    *_set("full", "hd128 1:1 fp16", ALL, heads=(4, 4), dtype="float16"),
    *_set("full", "hd128 options", ALL, heads=(6, 2), **_OPTIONS),
    *_set("full", "hd256 8:1", ALL, heads=(8, 1), window=100, clamp=False, **_dims(256)),
    *_set("full", "hd256 options", ("tile edges", "chunks"), **_dims(256), **_OPTIONS),
    *_set("full", "hd64 pages 128", ("tile edges", "chunks"), page_size=128, **_dims(64)),
    *_set("full", "hd128 pages 16 window 100", ("tile edges", "chunks"), page_size=16, window=100),
    *_set("full", "hd192-128 pages 16", ("tile edges", "chunks"), page_size=16, **_dims(192, 128)),
    *_set("full", "hd256 pages 16 window 50", ("tile edges", "chunks"), page_size=16, window=50, **_dims(256)),
    *_set("full", "hd256 pages 80", ("tile edges", "chunks"), page_size=80, **_dims(256)),
    *_set("full", "hd256 pages 64 window 50", ("tile edges", "chunks"), page_size=64, window=50, **_dims(256)),
    *_set("full", "hd512 pages 16", ("tile edges", "chunks"), page_size=16, **_dims(512)),
    *_set("full", "hd256 two intervals", ("prompts",), mask="two intervals", **_dims(256)),
    *_set("full", "hd128 three intervals", ("prompts",), mask="three intervals"),
    *_set("full", "hd128 block of tags", ("many images",), mask="block of tags"),
    _timed("full", (8192, 8192), 128, None),
    _timed("full", (8192, 8192), 256, None),
    _timed("full", (8192, 8192), 128, 1024),
    _timed("full", (8192, 8192), 256, 1024),
    dataclasses.replace(
        _timed("full", (8192, 8192), 256, 1024), name="2 x 8192, hd256 window 1024 pages 16", page_size=16
    ),
)

CASES = {case.name: case for case in EVERY}
