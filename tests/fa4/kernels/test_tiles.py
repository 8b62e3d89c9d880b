"""The tiles that FA4 takes, of the mask and of its kernels."""

from __future__ import annotations

from fa4_prefixlm.fa4.kernels.tiles import forward_tile


def test_the_defect_is_harmless_only_with_tile_128_or_the_workaround() -> None:
    """The tiles that need the workaround are the ones of head dims above 128."""
    narrow = [
        dim for dim in (64, 96, 128, 192, 256) if forward_tile(90, dim, dim, windowed=False, max_seqlen_q=999).n != 128
    ]
    assert narrow == [192, 256]
