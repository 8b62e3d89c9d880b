"""What a mask is: an immutable value that says the same thing twice, and tests hold the two together.

- `intervals`: per query row, the few half-open intervals of keys it sees. This is what kernels read.
- `visible`: per (query, key) pair, whether the query sees the key, written as the mask is said. The reference backend,
  the FlexAttention form and the tests evaluate it.

`algebra` has the atoms, and what `&` and `|` make of them. A mask of your own subclasses `Mask`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from .custom import CustomKernel
    from .flex import MaskMod
    from .picture import MaskPicture
    from .ranges import NamedRanges

EMPTY_LO = torch.iinfo(torch.int32).max
EMPTY_HI = 0
# Stands for the end of a sequence's keys, wherever that is.
END_OF_KEYS = torch.iinfo(torch.int32).max

Intervals = tuple[torch.Tensor, torch.Tensor]


class Rows(Protocol):
    """What `Mask.intervals` may look at. Every tensor is int32 `(total_q,)` on the device, one entry per query token.

    position: absolute key position of the query in its sequence. seqlen_k: number of keys of its sequence.
    sequence: index of its sequence in the batch.
    """

    position: torch.Tensor
    seqlen_k: torch.Tensor
    sequence: torch.Tensor

    def span_of(self, name: str) -> Intervals:
        """`(start, end)` of the span of `name` that holds the row, `(EMPTY_LO, EMPTY_HI)` if none does."""

    def latest_span(self, name: str) -> Intervals:
        """`(start, end)` of the last span of `name` that starts at or before the row; empty if there is none."""

    def spans_of(self, name: str) -> Intervals:
        """`(start, end)`, each `(total_q, spans)`: all spans of `name` in the row's sequence, ascending; empty last."""


class Pairs(Protocol):
    """What `Mask.visible` may look at: positions of queries and keys that broadcast, and who is in which span."""

    query: torch.Tensor
    key: torch.Tensor

    @property
    def sequence(self) -> int | torch.Tensor:
        """Index of the sequence in the batch."""

    def same_span(self, name: str) -> torch.Tensor:
        """Query and key are in the same span of `name`."""

    def query_in(self, name: str) -> torch.Tensor:
        """The query is in some span of `name`."""

    def key_in(self, name: str) -> torch.Tensor:
        """The key is in some span of `name`."""

    def before_end_of_latest(self, name: str) -> torch.Tensor:
        """The key is before the end of the last span of `name` that starts at or before the query."""


@dataclass(frozen=True)
class Reach:
    """How far a row at position `p` can see: keys `[p - left, p + right)`.

    left None: every row sees key 0. right None: no bound.
    """

    left: int | None
    right: int | None


class Mask(abc.ABC):
    """Which keys each query sees. Immutable: equality, hash and repr are by value.

    centered: each row sees one interval, which holds the row's own position, or nothing.
    total: no row sees nothing.
    evaluated: `intervals` looks at values and synchronises.
    """

    centered: bool = False
    total: bool = False
    evaluated: bool = False

    @property
    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """Names of the span sets the mask reads."""

    @abc.abstractmethod
    def count(self, spans: Mapping[str, int]) -> int:
        """Upper bound of the number of intervals of a row, where `spans[name]` is the most spans of a sequence."""

    @abc.abstractmethod
    def intervals(self, rows: Rows) -> Intervals:
        """`(lo, hi)`, each int32 `(total_q, K)`: the row sees keys `[lo[k], hi[k])` of its sequence, `lo >= hi` none.

        The K intervals of a row are disjoint and ascending, empty ones last. `hi = END_OF_KEYS` is the end of the
        sequence's keys; any other key outside of them is an error.
        """

    @abc.abstractmethod
    def visible(self, pairs: Pairs) -> torch.Tensor:
        """Boolean, in the shape that the pairs broadcast to."""

    def reach(self, longest: Mapping[str, int]) -> Reach:
        """Upper bound over all rows, for spans of at most `longest[name]` tokens. It sizes buffers, nothing else."""
        return Reach(None, None)

    def block_name(self) -> str | None:
        """The span set that the mask joins into one block by `... | one_block(name)`, if it is written so."""
        return None

    def without_block(self) -> Mask:
        """The mask without the block of `block_name`."""
        return self

    @property
    def custom_kernel(self) -> CustomKernel | None:
        """Kernel code that the mask brings itself (`from_cute`); None: the library's mask_mods run it."""
        return None

    def __and__(self, other: Mask) -> Mask:
        from .algebra import both

        return both(self, other) if isinstance(other, Mask) else NotImplemented

    def __bool__(self) -> bool:
        raise TypeError("a mask is neither true nor false: combine masks with & and |, not with `and`, `or`, `not`")

    def __or__(self, other: Mask) -> Mask:
        from .algebra import either

        return either(self, other) if isinstance(other, Mask) else NotImplemented

    def dense(self, *, seqlen: int, spans: NamedRanges = None, seqlen_q: int | None = None) -> torch.Tensor:
        """The mask of one sequence, bool `(seqlen_q, seqlen)`; the queries are its last `seqlen_q` positions."""
        from .backends.reference import dense_mask
        from .ranges import one_sequence

        return dense_mask(self, seqlen if seqlen_q is None else seqlen_q, seqlen, one_sequence(self, spans, seqlen))

    def show(self, *, seqlen: int, spans: NamedRanges = None, seqlen_q: int | None = None) -> MaskPicture:
        """A picture of the mask of one sequence: text in a terminal (`print` it), an image in a notebook.

        spans: `[(8, 24), (40, 56)]`, or by name: `{"image": [(8, 24)], "prompt": [(0, 8)]}`.
        """
        from .picture import MaskPicture

        return MaskPicture(self, seqlen, spans, seqlen_q)

    def flex(
        self, *, seqlen: int, spans: NamedRanges = None, seqlen_q: int | None = None, device: str = "cpu"
    ) -> MaskMod:
        """The mask as a `torch.nn.attention.flex_attention` mask_mod `(b, h, q_idx, kv_idx)`.

        spans: per batch entry, as `plan` takes them for batched tensors. `q_idx` counts from the first query.
        """
        from .flex import to_flex

        return to_flex(self, seqlen=seqlen, spans=spans, seqlen_q=seqlen_q, device=device)
