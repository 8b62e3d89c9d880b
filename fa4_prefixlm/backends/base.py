"""What every backend is: a verdict on a call, and a prepared state that runs it."""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.ranges import SpanSets
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.build.describe import Build
from fa4_prefixlm.geometry.intervals import Bounds, Tokens, row_bounds, tokens
from fa4_prefixlm.geometry.tiles import TileCounts
from fa4_prefixlm.geometry.traits import Traits
from fa4_prefixlm.masks.base import Mask


@dataclass(frozen=True)
class MaskedBatch:
    """One batch under one mask, ready for any backend.

    Attributes:
        spec: what the tensors look like.
        keys: where the keys are.
        build: the FA4 to run on, None if there is none.
        in_one_launch: `rows.kernel_rows` fills and checks what the kernel reads, in one launch, see there.
    """

    spec: CallSpec
    mask: Mask
    spans: SpanSets
    lengths: Lengths
    traits: Traits
    keys: Keys
    build: Build | None = None
    in_one_launch: bool = False

    @functools.cached_property
    def where(self) -> Tokens:
        """Where each query token stands; computed when it is first looked at."""
        return tokens(self.lengths)

    @functools.cached_property
    def bounds(self) -> Bounds:
        """The keys that each query row sees; computed when they are first looked at."""
        most = None if self.traits.custom else self.traits.intervals
        return row_bounds(self.mask, self.spans, self.lengths, self.where, most)

    @property
    def known_on_host(self) -> bool:
        """The host knows the lengths and the spans, so that they are checked."""
        return self.lengths.known and all(own.host is not None for own in self.spans.values())

    def fa4(self) -> Build:
        """The build, which there is once a backend that needs it was chosen."""
        assert self.build is not None, "a backend is prepared only after its verdict"
        return self.build


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
    reads_kernel_rows = False  # of its batch, it reads what `rows.kernel_rows` returns, and nothing else per token

    @abc.abstractmethod
    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None) -> str | None:
        """Why this backend can't run the call exactly; None if it can."""

    @abc.abstractmethod
    def prepare(self, batch: MaskedBatch) -> Prepared:
        """Build the state on the device without synchronising it."""
