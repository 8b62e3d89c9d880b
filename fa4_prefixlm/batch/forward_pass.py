"""What a backward reads of its forward, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

import torch

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ForwardPass(NamedTuple):
    """What a forward read and returned, packed, for its backward.

    Attributes:
        q, k, v, out: `(total, heads, head_dim)`.
        lse: `(heads, total_q)` float32, the sink included.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
