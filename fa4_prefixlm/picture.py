"""Pictures of masks, made by the code that runs: `dense_mask` says who sees whom, `tile_runs` what a kernel visits.

Needs Pillow; `mask_text` does not. Queries run down, keys run to the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .mask import Mask

if TYPE_CHECKING:
    from PIL import Image

Span = tuple[int, int]
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

# States of a (query, key) pair; a tile's kind is added to them: HIDDEN + SKIPPED is a hidden pair of a skipped tile.
HIDDEN, PLAIN, SPAN = 0, 1, 2
PARTIAL, FULL, SKIPPED = 0, 3, 6

# Blue and orange of the Okabe-Ito palette, which the colour-blind can tell apart, darker where a tile is full.
INK, FAINT, WRONG = (40, 44, 52), (196, 199, 204), (214, 0, 120)
COLOURS: dict[int, Colour] = {
    HIDDEN: (233, 235, 238),
    PLAIN: (86, 160, 211),
    SPAN: (240, 170, 40),
    FULL + PLAIN: (20, 92, 150),
    FULL + SPAN: (190, 106, 0),
    SKIPPED + HIDDEN: (255, 255, 255),
    # Never seen unless the block lists are wrong: a full tile with a hidden pair, a skipped tile with a visible one.
    FULL + HIDDEN: WRONG,
    SKIPPED + PLAIN: WRONG,
    SKIPPED + SPAN: WRONG,
}
TEXT = {HIDDEN: ".", PLAIN: "#", SPAN: "o"}
MARGIN, BAR, FONT_SIZE, SWATCH = 58, 5, 15, 14


def mask_text(mask: Mask, *, seqlen_k: int, spans: Sequence[Span] = (), seqlen_q: int | None = None) -> str:
    """The mask of one sequence as text: one line per query, one character per key, and a legend.

    spans: half-open `(start, end)` key positions. seqlen_q: the queries are the last `seqlen_q` of the `seqlen_k`
    positions; None is all of them.
    """
    states = _pair_states(mask, *_sequence(seqlen_q, seqlen_k, spans))
    legend = f"{TEXT[PLAIN]} visible, {TEXT[SPAN]} visible because of a span, {TEXT[HIDDEN]} hidden"
    return "\n".join(["".join(TEXT[state] for state in row) for row in states.tolist()] + [legend])


def mask_image(
    mask: Mask,
    *,
    seqlen_k: int,
    spans: Sequence[Span] = (),
    seqlen_q: int | None = None,
    cell: float | None = None,
    tile: tuple[int, int] | None = None,
) -> Image.Image:
    """The mask of one sequence as an RGB image with axes, span markers and a legend; arguments as in `mask_text`.

    cell: pixels per token, below 1 for long sequences; None makes the keys about 600 pixels wide.
    tile: `(tile_m, tile_n)` draws the tiles too, and which of them a kernel visits with a mask, without, or not at all.
    """
    sizes, checked = _sequence(seqlen_q, seqlen_k, spans)
    scale = cell or (max(1.0, 600 // seqlen_k) if seqlen_k <= 1200 else 600 / seqlen_k)
    states = _pair_states(mask, sizes, checked)
    tiles = list(_tiles(mask, sizes, checked, tile)) if tile else []
    for (left, top, right, bottom), kind in tiles:
        states[top:bottom, left:right] += kind
    plot = _plot(states, scale, tiles)
    entries = [(PLAIN, "causal"), (SPAN, "because of a span"), (HIDDEN, "hidden")]
    names = {PARTIAL: "partial: masked", FULL: "full: no mask needed", SKIPPED: "skipped"}
    counts = {kind: sum(kind == own for _, own in tiles) for kind in names}
    entries += [(10 + kind, f"{counts[kind]} tiles {names[kind]}") for kind in names if tile]
    image = _canvas(plot.width + MARGIN + 24, MARGIN + plot.height + 8 + _legend(None, entries, plot.width, (0, 0)))
    image.paste(plot, (MARGIN, MARGIN))
    down = _axis(
        "queries",
        sizes.max_seqlen_q,
        [(s - _first(sizes), e - _first(sizes)) for s, e in checked.on_host()[0]],
        scale,
        _first(sizes),
    )
    image.paste(_axis("keys", seqlen_k, checked.on_host()[0], scale, 0), (MARGIN, 0))
    return image
