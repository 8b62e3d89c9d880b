"""Which tile a forward kernel runs with. Given to FA4 explicitly, never left to its heuristics: the block lists must be
cut with the very same tile.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """The tile of a forward kernel.

    Attributes:
        m: query rows of one tile.
        n: keys of one tile.
        stages: query tiles that a CTA holds.
        p_in_registers: FA4's `mma_pv_is_rs` (SM90).
    """

    m: int
    n: int
    stages: int = 1
    p_in_registers: bool = True

    @property
    def block_m(self) -> int:
        """Query rows that one block list covers."""
        return self.m * self.stages

    def __str__(self) -> str:
        return f"{self.block_m}x{self.n}"


def forward_tile(arch: int, head_dim: int, head_dim_v: int, *, windowed: bool, max_seqlen_q: int) -> Tile:
    """The forward tile for head dims that `HeadDims.refusal` accepts.

    Args:
        arch: compute capability, 90 for SM90.
        head_dim: of q and k.
        head_dim_v: of v.
        windowed: rows see few keys, so that a narrow key tile wastes less at the edges.
        max_seqlen_q: query rows of the longest sequence as the kernel sees it (SM100 runs one stage on short ones).
    """
    if arch // 10 != 9:
        one_stage = max_seqlen_q <= 128 or head_dim_v == 256
        return Tile(128, 128, stages=1 if one_stage else 2)
    widest = max(head_dim, head_dim_v)
    if widest <= 64:
        return Tile(192, 128)
    if widest <= 96:
        return Tile(192, 128, p_in_registers=False)
    if widest <= 128:
        return Tile(128, 128)
    if widest <= 192:
        return Tile(128, 128 if head_dim_v <= 128 else 112)
    return Tile(128, 64 if windowed else 80)
