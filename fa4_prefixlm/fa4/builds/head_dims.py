"""Which head dims a build's kernels take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadDims:
    """Which head dims a build's forward kernels take, multiples of 8. The defaults are those of 4.0.0b36.

    Attributes:
        sm90: the widest on SM90.
        sm90_pairs: wider pairs `(head_dim, head_dim_v)` that SM90 takes as well.
        sm100: the widest on SM100.
        sm100_pairs: wider pairs that SM100 takes as well.
        sm100_masked_256: SM100 takes a mask_mod at head dim 256.
    """

    sm90: int = 256
    sm90_pairs: frozenset[tuple[int, int]] = frozenset()
    sm100: int = 128
    sm100_pairs: frozenset[tuple[int, int]] = frozenset({(192, 128), (256, 256)})
    sm100_masked_256: bool = True

    def refusal(self, arch: int, head_dim: int, head_dim_v: int) -> str | None:
        """Why there is no forward kernel for these head dims on this architecture; None if there is one."""
        if head_dim % 8 or head_dim_v % 8:
            return "head dims must be multiples of 8"
        if arch // 10 not in (9, 10, 11):
            return f"no kernel for sm_{arch}: FA4's kernels for these masks run on SM90 and SM100"
        widest, pairs = (self.sm90, self.sm90_pairs) if arch // 10 == 9 else (self.sm100, self.sm100_pairs)
        if max(head_dim, head_dim_v) <= widest or (head_dim, head_dim_v) in pairs:
            return None
        more = "".join(f", {pair}" for pair in sorted(pairs))
        return f"{'SM90' if arch // 10 == 9 else 'SM100'} takes head dims up to {widest}{more}"
