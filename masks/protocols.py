"""What a mask may look at, and the small values it answers with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

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


class SeesPairs(Protocol):
    """A mask, as far as who sees whom can be asked of it."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the span sets that it reads."""

    def visible(self, pairs: Pairs) -> torch.Tensor:
        """Boolean, in the shape that the pairs broadcast to."""


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
