"""What a call with a mask_mod says to FA4."""

from __future__ import annotations

from fa4_prefixlm.backends import mask_mod_call as fa4_common
from fa4_prefixlm.fa4.kernels.tiles import forward_tile


def test_sm100_blocks_cover_both_stages() -> None:
    assert str(forward_tile(100, 128, 128, windowed=False, max_seqlen_q=1000)) == "256x128"
    assert str(forward_tile(100, 128, 128, windowed=False, max_seqlen_q=128)) == "128x128"
    assert str(forward_tile(100, 256, 256, windowed=False, max_seqlen_q=1000)) == "128x128"


def test_pack_gqa_is_said_not_left_to_fa4() -> None:
    assert fa4_common.PACK_GQA is False
