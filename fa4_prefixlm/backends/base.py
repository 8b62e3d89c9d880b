"""What every backend has: a verdict on a call, and a prepared state that runs it."""

from __future__ import annotations

import abc
import dataclasses
import functools
from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.forward_pass import ForwardPass, Grads
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.ranges import SpanSets
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.device_checks import is_capturing, is_fake
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry.intervals import Bounds, LatestSpan, Tags, Tokens, latest_span, row_bounds, tags_of, tokens
from fa4_prefixlm.geometry.telling_rows import Pieces, TellingRows
from fa4_prefixlm.geometry.tiles import TileCounts
from fa4_prefixlm.geometry.traits import Traits, as_run, most_spans
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.plain_parts import few_parts


@dataclass(frozen=True)
class MaskedBatch:
    """One batch under one mask, ready for any backend.

    Attributes:
        spec: shapes, dtypes and device of the tensors.
        mask: the mask.
        spans: its spans, by name.
        lengths: of the sequences.
        traits: what the mask asks of a kernel.
        keys: where the keys are, contiguous or in pages.
        build: the FA4 to run on; None: there is none.
        in_one_launch: `rows.kernel_rows` fills and checks what the kernel reads, in one launch, see there.
        telling: rows that may tell what all see; None: all are looked at.
    """

    spec: CallSpec
    mask: Mask
    spans: SpanSets
    lengths: Lengths
    traits: Traits
    keys: Keys
    build: Build | None = None
    in_one_launch: bool = False
    telling: TellingRows | None = None

    @property
    def on_gpu(self) -> bool:
        """Kernels can be launched over its tensors."""
        return self.spec.device.type == "cuda" and not is_fake(self.lengths.cu_seqlens_q)

    @functools.cached_property
    def where(self) -> Tokens:
        """Where each query token stands; computed when it is first looked at."""
        if self.on_gpu:
            from fa4_prefixlm.kernels.token_places import token_places

            return token_places(self.lengths)
        return tokens(self.lengths)

    @functools.cached_property
    def bounds(self) -> Bounds:
        """The keys that each query row sees; computed when they are first looked at."""
        return self.untagged if self.block is None else dataclasses.replace(self.untagged, tags=self._tags(self.block))

    @functools.cached_property
    def untagged(self) -> Bounds:
        """The bounds without tags."""
        composed = self._composed()
        if composed is not None:
            return composed
        pieces = self._pieces()
        if pieces is not None:
            if self.on_gpu:
                from fa4_prefixlm.kernels.pieces import all_rows

                return all_rows(pieces, self.lengths.total_q, self.lengths.device)
            return pieces.bounds(self.lengths.total_q, self.lengths.device)
        most = None if self.traits.custom else self.traits.intervals
        return row_bounds(self.mask, self.spans, self.lengths, self.where, most, self.find_latest, with_tags=False)

    @functools.cached_property
    def block(self) -> str | None:
        """The span set whose tokens see each other by tags; None: there is none."""
        return self._as_run[1] if self.traits.tagged else None

    @functools.cached_property
    def _as_run(self) -> tuple[Mask, str | None]:
        return as_run(self.mask, most_spans(self.spans))

    def _tags(self, block: str) -> Tags:
        if self.on_gpu:
            from fa4_prefixlm.kernels.token_tables import tag_tables, takes

            if takes([block], self.spans, self.lengths):
                sizes = self.lengths.total_q, self.lengths.total_k
                return tag_tables(self.spans[block], self.lengths, *sizes).tags
        return tags_of(block, self.spans, self.lengths, self.where, self.find_latest)

    @property
    def find_latest(self) -> LatestSpan:
        """What finds the spans of its tokens."""
        if self.on_gpu:
            from fa4_prefixlm.kernels import token_places

            return token_places.latest_span
        return latest_span

    def _composed(self) -> Bounds | None:
        """The bounds of a mask of plain parts, filled in one launch; None where that is not to be."""
        # A graph would copy the mask anew, out of memory that is others' by then.
        if not self.on_gpu or self.traits.custom or is_capturing():
            return None
        from fa4_prefixlm.kernels.composed_rows import composed_rows, takes

        parts = few_parts(self._as_run[0])
        if parts is None or not takes(parts, self.spans, self.lengths):
            return None
        return composed_rows(parts, self.spans, self.lengths, self.traits.intervals)

    def _pieces(self) -> Pieces | None:
        """The bounds as few rows tell them; None where they do not."""
        if self.telling is None or self.traits.tagged or self.traits.custom:
            return None
        told = self.telling.mask, self.telling.spans, self.telling.lengths
        if any(own is not other for own, other in zip(told, (self.mask, self.spans, self.lengths), strict=True)):
            return None  # another batch made of this one: keys were left out, see `gathered`
        if self.on_gpu and is_capturing():  # a graph would copy them anew, out of memory that is others' by then
            return None
        return self.telling.pieces(self.traits.intervals)

    @property
    def packed_bounds(self) -> Bounds:
        """The bounds, counting the packed keys of the whole batch."""
        return self.bounds.shifted(self.where.key_offset)

    @property
    def known_on_host(self) -> bool:
        """The host knows the lengths and the spans, so that they are checked."""
        return self.lengths.known and all(own.host is not None for own in self.spans.values())

    def fa4(self) -> Build:
        """The build. A backend that needs one refuses a call without."""
        assert self.build is not None, "a backend is prepared only if it did not refuse the call"
        return self.build


class Prepared(abc.ABC):
    """A backend's state for one batch and mask, reused by every layer."""

    @abc.abstractmethod
    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one layer.

        Args:
            q: `(total_q, heads, head_dim)` on the plan's device.
            k, v: `(total_k, kv_heads, head_dim)`; the cache, `(pages, page_size, kv_heads, head_dim)`, where the plan
                has pages.
            options: scale, softcap and sink.
            out: written in place and returned; None: allocated.

        Returns:
            `(out, lse)`: `(total_q, heads, head_dim_v)` in the dtype of q, and `(heads, total_q)` float32.
        """

    @abc.abstractmethod
    def describe(self) -> list[tuple[str, str]]:
        """Lines (label, text) for `print(plan)`."""

    def tile_counts(self) -> TileCounts | None:
        """How many key tiles are visited; None where the backend has no tiles. Synchronises."""
        return None


class Gradients(abc.ABC):
    """A backward's state for one batch and mask: made when a gradient is first needed, reused by every layer."""

    @abc.abstractmethod
    def run(self, forward: ForwardPass, dout: torch.Tensor, dlse: torch.Tensor | None, options: Options) -> Grads:
        """`(dq, dk, dv)`, shaped as `q`, `k`, `v`.

        Args:
            dout: the gradient of `out`.
            dlse: of `lse`; None: nobody used it.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """One line for `print(plan)`."""


@dataclass(frozen=True)
class Refusal:
    """Why a backward can't run a batch, where only the values of its mask tell."""

    reason: str


class BackwardBackend(abc.ABC):
    """Computes gradients from what any exact forward returned."""

    name: str
    summary: str

    @abc.abstractmethod
    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None, *, deterministic: bool) -> str | None:
        """Why this backward can't run the call exactly; None if it can.

        Args:
            deterministic: the gradients must be the same bits in every run.
        """

    @abc.abstractmethod
    def prepare(self, batch: MaskedBatch, *, deterministic: bool) -> Gradients | Refusal:
        """Build the state on the device."""


class Backend(abc.ABC):
    """A way to run calls.

    Attributes:
        name: as in `attention(..., backend=name)`.
        summary: one line for `print(plan)`.
        differentiable: autograd works through it.
        reads_pages: it can read keys in pages by itself.
    """

    name: str
    summary: str
    reads_pages = False
    reads_kernel_rows = False  # of its batch, it reads what `rows.kernel_rows` returns, and nothing else per token

    @abc.abstractmethod
    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None) -> str | None:
        """Why this backend can't run the call exactly; None if it can."""

    @abc.abstractmethod
    def prepare(self, batch: MaskedBatch) -> Prepared:
        """Build the state on the device without synchronising it."""
