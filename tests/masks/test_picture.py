"""Pictures of masks."""

from __future__ import annotations

import fa4_prefixlm as fp
from fa4_prefixlm.geometry.drawn_tiles import drawn_tiles
from fa4_prefixlm.masks.dense import dense_mask
from fa4_prefixlm.masks.picture import COLOURS, HIDDEN, LETTERS, MARGIN, SPAN, VISIBLE, mask_image, mask_text


def test_text() -> None:
    lines = mask_text(fp.PrefixLM(3), seqlen_k=6, ranges=[(1, 5)], seqlen_q=3).splitlines()
    assert lines[:3] == [".###o.", "..###.", "...###"]
    assert lines[3] == "# visible, o visible because of a span, . hidden"


def test_the_image_shows_the_mask() -> None:
    mask, spans = fp.PrefixLM(20, clamp=False), ((5, 40), (50, 60))
    image = mask_image(mask, seqlen_k=64, ranges=spans, cell=3)
    visible = dense_mask(mask, 64, 64, {"image": spans})
    shown = {bytes.fromhex(COLOURS[state][1:]): state for state in (HIDDEN, VISIBLE, SPAN)}
    for row, key in ((0, 0), (0, 1), (10, 39), (39, 5), (39, 4), (30, 11), (63, 40), (63, 44), (55, 59)):
        colour = bytes(image.getpixel((MARGIN + key * 3 + 1, MARGIN + row * 3 + 1)))
        assert (shown[colour] != HIDDEN) == bool(visible[row, key])


def test_tiles_in_the_image_are_right() -> None:
    """Pink would be a full tile with a hidden pair, or a skipped one with a visible pair."""
    mask, given = fp.PrefixLM(100), [(30, 200), (333, 480)]
    tiles = drawn_tiles(mask, seqlen_k=500, ranges=given, tile=(64, 32))
    assert {kind for _, kind in tiles} == {"full", "partial", "skipped"}
    image = mask_image(mask, seqlen_k=500, ranges=given, tiles=tiles)
    pink = bytes.fromhex(COLOURS[3][1:])
    assert pink not in {bytes(colour) for _, colour in image.getcolors(2**20)}


def test_letters_are_distinct() -> None:
    assert len(set(LETTERS)) == 4
