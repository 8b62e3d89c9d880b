"""Which tile a backward kernel runs with, and how. Given to FA4 explicitly: the tables are cut with the same tile."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Nearly eight CTAs for each SM of an H100. Folding serves so many up to head dim 128, and 1632 at 256; 128 and 204 it
# slows down. Between them nothing was measured.
MANY_KEY_TILES = 1024


@dataclass(frozen=True)
class BackwardTile:
    """The tile of FA4's SM90 backward, and how it is computed.

    Attributes:
        m, n: query rows and keys of a tile.
        stages_q, stages_do, stages_pds: how many of Q, dO, and P and dS are in shared memory.
        swap_sdp: S and dP are computed transposed, so a thread holds few keys and many rows.
        swap_dkv: dK and dV are.
        atoms: warp groups along M of S and dP, along N of dK and dV, along M of dQ.
        dq_by_one: one warp group computes all of dQ.
        skip_full: query tiles all of whose rows see all keys of the key tile are not masked. It costs a branch, which
            windows earn back, and without which ptxas serialises the products of head dims up to 64.
        by_heads: CTAs take a key tile of several heads before the next key tile, of as many as the L2 cache holds; else
            all key tiles of a head before the next head. FA4 does so where the sums of dQ have an order.
        fold: a CTA takes all query heads of its key head, in turn, and sums dK and dV of them in registers, not in
            float32 in memory. Not where the sums of dQ have an order.
        fold_from: how many key tiles of all key heads there must be for `fold`; None: it is never done.
        step: which class computes one query tile, see `native_backward.kernel_class`.
    """

    m: int
    n: int
    stages_q: int = 2
    stages_do: int = 2
    stages_pds: int = 2
    swap_sdp: bool = True
    swap_dkv: bool = False
    atoms: tuple[int, int, int] = (1, 2, 1)
    dq_by_one: bool = False
    skip_full: bool = True
    by_heads: bool = False
    fold: bool = False
    fold_from: int | None = None
    step: str = "fa4"

    # FA4's kernels for these tiles have two warp groups of products beside the one that loads and stores.
    warp_groups = 2

    @property
    def head_dim_multiple(self) -> int:
        """What head dims are rounded up to in the float32 accumulators."""
        return 64 if self.swap_dkv else 32

    def __str__(self) -> str:
        return f"{self.m}x{self.n}{', full tiles unmasked' * self.skip_full}"


def native_tile(head_dim: int, head_dim_v: int, *, windowed: bool, deterministic: bool = False) -> BackwardTile:
    """The tile of the native backward, FA4's own for a causal or windowed mask.

    windowed: rows see few keys, so the mask is a larger part of the work.
    deterministic: the sums of dQ have an order.
    """
    if head_dim <= 128:
        if head_dim <= 64:
            tile = BackwardTile(128, 128, atoms=(1, 2, 2))
        elif head_dim <= 96:
            tile = BackwardTile(64, 128, dq_by_one=True)
        else:
            tile = BackwardTile(64, 128, skip_full=windowed)
        return tile if deterministic else replace(tile, by_heads=True, fold_from=MANY_KEY_TILES)
    if head_dim <= 192:
        stages_do = 2 if head_dim_v <= 128 else 1
        return BackwardTile(64, 96, stages_do=stages_do, stages_pds=1, swap_sdp=False, swap_dkv=True)
    if not deterministic and head_dim == head_dim_v == 256:
        tile = BackwardTile(64, 80, stages_do=1, swap_sdp=False, swap_dkv=True, atoms=(1, 1, 1), step="256")
        return replace(tile, fold_from=MANY_KEY_TILES)
    return BackwardTile(
        64, 48, stages_do=1, stages_pds=1, swap_sdp=False, swap_dkv=True, atoms=(1, 1, 1), skip_full=windowed
    )


def packed_tile(arch: int, head_dim: int) -> tuple[int, int]:
    """Query rows and keys of FA4's block-sparse backward."""
    if arch // 10 != 9 or head_dim <= 64:
        return 128, 128
    if head_dim <= 128:
        return 64, 128
    return (64, 96) if head_dim <= 192 else (64, 64)
