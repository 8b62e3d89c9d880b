"""What a mask must define. A mask is an immutable value; it says the same thing twice, and tests hold the two together:

- `bounds`: per query row, the one half-open interval of keys it sees. This is what kernels read.
- `visible`: per (query, key) pair, whether the query sees the key, written as the mask is said. Only the reference
  backend, pictures and tests evaluate it.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """What `Mask.bounds` may look at: one entry per query token, all int32 `(total_q,)` on the device.

    position: absolute key position of the query in its sequence.
    seqlen_k: number of keys of its sequence.
    span_start, span_end: the span that holds the query, or `[position, position + 1)` outside of spans.
    """

    position: torch.Tensor
    seqlen_k: torch.Tensor
    span_start: torch.Tensor
    span_end: torch.Tensor


@dataclass(frozen=True)
class Reach:
    """How far a row at position `p` can see: keys `[p - left, p + right)`. `left = None`: every row sees key 0."""

    left: int | None
    right: int


class Mask(abc.ABC):
    """A mask whose rows each see one interval of keys. Subclasses are frozen dataclasses with keyword options."""

    @abc.abstractmethod
    def bounds(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """`(lo, hi)`, each int32 `(total_q,)`: the row sees keys `[lo, hi)` of its sequence; `lo >= hi` sees none.

        Values outside `[0, seqlen_k)` are clipped by the caller.
        """

    @abc.abstractmethod
    def visible(self, q_pos: torch.Tensor, kv_pos: torch.Tensor, same_span: torch.Tensor) -> torch.Tensor:
        """Boolean, broadcast over `q_pos` `(rows, 1)`, `kv_pos` `(1, keys)` and `same_span` `(rows, keys)`."""

    @abc.abstractmethod
    def reach(self, longest_span: int) -> Reach:
        """Upper bound over all rows, for spans of at most `longest_span` tokens. It sizes buffers, nothing else."""
