"""What a mask may look at, and the small values it answers with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fa4_prefixlm.batch.ranges import ReadsSpans, Whole
from fa4_prefixlm.masks.interval_lists import Intervals

# FlexAttention's `mask_mod(b, h, q_idx, kv_idx)`.
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Rows(Protocol):
    """What `Mask.intervals` may look at. Every tensor is int32 `(total_q,)` on the device, one entry per query token.

    Attributes:
        position: absolute key position of the query in its sequence.
        seqlen_k: number of keys of its sequence.
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
    """What `Mask.visible` may look at: positions of queries and keys that broadcast, and who is in which span.

    They come in two kinds: rows against the keys of one sequence, 2-d, and a single query and key, 0-d (`Mask.flex`).
    So a rule is written in operations that broadcast and that `torch.vmap` takes: no `if` on values, no fixed number of
    dimensions. Methods return a tensor that broadcasts with both, bool or, of offsets, an integer one.

    Attributes:
        query: positions of queries in their sequence, int64 `(rows, 1)`; or 0-d, int64 or int32.
        key: positions of keys in their sequence, int64 `(1, keys)`; or 0-d, int64 or int32.
    """

    query: torch.Tensor
    key: torch.Tensor

    @property
    def sequence(self) -> int | torch.Tensor:
        """Index of the sequence in the batch: an int, or where `query` and `key` are 0-d a 0-d integer tensor."""

    def same_span(self, name: str) -> torch.Tensor:
        """Query and key are in the same span of `name`."""

    def query_in(self, name: str) -> torch.Tensor:
        """The query is in some span of `name`."""

    def key_in(self, name: str) -> torch.Tensor:
        """The key is in some span of `name`."""

    def query_offset(self, name: str) -> torch.Tensor:
        """Tokens before the query in the span of `name` that holds it; -1 if none does."""

    def key_offset(self, name: str) -> torch.Tensor:
        """The same of the key."""

    def before_end_of_latest(self, name: str) -> torch.Tensor:
        """The key is before the end of the last span of `name` that starts at or before the query."""


class SeesPairs(ReadsSpans, Protocol):
    """A mask, as far as who sees whom can be asked of it."""

    def visible(self, pairs: Pairs) -> torch.Tensor:
        """Boolean, in the shape that the pairs broadcast to."""


@dataclass(frozen=True)
class Ahead:
    """Up to where rows may see past their own position, as an upper bound. Nothing of it: no row sees ahead of itself.

    Attributes:
        keys: to the end of the keys.
        spans: to the end of a span that began at or before the row, of these sets.
        blocks: rows in a span see all spans of the sequence, of these sets.
        everywhere: all rows see all spans of the sequence, of these sets.
    """

    keys: bool = False
    spans: frozenset[str] = frozenset()
    blocks: frozenset[str] = frozenset()
    everywhere: frozenset[str] = frozenset()

    def joined(self, other: Ahead) -> Ahead:
        """That of `|`: either may be what a row sees."""
        return Ahead(
            self.keys or other.keys,
            self.spans | other.spans,
            self.blocks | other.blocks,
            self.everywhere | other.everywhere,
        )

    def met(self, other: Ahead) -> Ahead:
        """That of `&`: each of the two bounds it, so the nearer one does."""
        return min(self, other, key=lambda own: (own.keys, bool(own.everywhere), bool(own.blocks), len(own.spans)))

    def whole(self, name: str) -> Whole:
        """What a chunk of a prefill must hold of the set `name`, see `Whole`."""
        if name in self.everywhere:
            return "all"
        if name in self.blocks:
            return "block"
        return "span" if self.keys or name in self.spans else "nothing"


@dataclass(frozen=True)
class Ends:
    """Where the intervals of rows may begin and end: at 0, at the end of the keys, at an edge of a span, and here.

    Attributes:
        of_row: so many tokens from the row's own position.
        of_span: so many tokens from an edge of a span.
    """

    of_row: frozenset[int] = frozenset()
    of_span: frozenset[int] = frozenset()

    def joined(self, other: Ends) -> Ends:
        """Those of two masks combined."""
        return Ends(self.of_row | other.of_row, self.of_span | other.of_span)


@dataclass(frozen=True)
class Reach:
    """How far a row at position `p` can see: keys `[p - left, p + right)`.

    Attributes:
        left: None: every row sees key 0.
        right: None: no bound.
    """

    left: int | None
    right: int | None


@dataclass(frozen=True, eq=False)
class CustomKernel:
    """Kernel code that a mask brings itself, see `from_cute`.

    Attributes:
        mask_mod: `(batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors) -> TensorSSA`.
        aux_tensors: what it reads.
    """

    mask_mod: Callable[..., Any]
    aux_tensors: tuple[torch.Tensor, ...]
