"""What every backend is: a verdict on a call, and a prepared state that runs it."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch

from ..call import CallSpec
from ..fa4.build import Build
from ..intervals import Bounds, Demand, Tokens
from ..lengths import Lengths
from ..mask import Mask
from ..paging import Pages
from ..ranges import SpanSets
from ..tiling import TileCounts


@dataclass(frozen=True)
class Work:
    """One batch under one mask, ready for any backend.

    pages: where the keys are, None if they are contiguous. build: the FA4 to run on, None if there is none.
    """

    call: CallSpec
    mask: Mask
    spans: SpanSets
    lengths: Lengths
    demand: Demand
    where: Tokens
    bounds: Bounds
    pages: Pages | None = None
    build: Build | None = None

    def fa4(self) -> Build:
        assert self.build is not None, "a backend is prepared only after its verdict"
        return self.build


@dataclass(frozen=True)
class Options:
    """Per-call options, checked. softcap 0.0 is none."""

    softmax_scale: float
    softcap: float
    learnable_sink: torch.Tensor | None


class Prepared(abc.ABC):
    """A backend's state for one batch and mask, reused by every layer."""

    @abc.abstractmethod
    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(out, lse)` for packed tensors `(total, heads, head_dim)`; lse is `(heads, total_q)` float32.

        `k` and `v` are the cache, `(pages, page_size, kv_heads, head_dim)`, where the plan has pages.
        """

    @abc.abstractmethod
    def describe(self) -> list[tuple[str, str]]:
        """(label, text) lines for `print(plan)`."""

    def tile_counts(self) -> TileCounts | None:
        """How many key tiles are visited; None where the backend has no tiles. Synchronises."""
        return None


class Backend(abc.ABC):
    name: str
    summary: str
    differentiable = False
    reads_pages = False

    @abc.abstractmethod
    def refusal(self, call: CallSpec, demand: Demand, build: Build | None) -> str | None:
        """Why this backend can't run the call exactly; None if it can."""

    @abc.abstractmethod
    def prepare(self, work: Work) -> Prepared:
        """Build the state on the device without synchronising it."""
