"""Pictures of masks: which pairs are visible (`dense_mask`), and which tiles a kernel visits (`geometry.drawn_tiles`).

Queries run down, keys run to the right. Images need Pillow; `mask_text` does not.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch

from fa4_prefixlm.batch.lengths import first_query
from fa4_prefixlm.batch.ranges import NamedRanges, SequenceSpans, one_sequence
from fa4_prefixlm.errors import install_hint
from fa4_prefixlm.masks.dense import dense_mask
from fa4_prefixlm.masks.protocols import SeesPairs

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SpanList = Sequence[tuple[int, int]]
Sets = dict[str, SequenceSpans]
Box = tuple[int, int, int, int]  # left, top, right, bottom
# A tile in tokens, and what a kernel does with it: visits it without a mask, with one, or not at all.
DrawnTile = tuple[Box, Literal["full", "partial", "skipped"]]

# The state of a (query, key) pair, to which the kind of its tile is added.
HIDDEN, VISIBLE, SPAN, MIXED = 0, 1, 2, 3
TILES = {"partial": 0, "full": 3, "skipped": 6}
LETTERS = ".#o+"
# Characters of a line of text, at most; larger masks are shown smaller.
TEXT_WIDTH = 128
# Blue and orange, which the colour-blind can tell apart; darker where a tile is full. Pink never shows unless the tiles
# are wrong: a full one with a hidden pair, or a skipped one with a visible pair.
COLOURS = ("#dcdfe4", "#64abdb", "#f2b134", "#d60078", "#14619c", "#c06c00", "#ffffff", "#d60078", "#d60078")
INK, RULE, WHITE = "#282c34", "#6d737d", "#ffffff"
MARGIN, LINE, SWATCH = 66, 25, 16


class MaskPicture:
    """A mask with the spans of one sequence, as `Mask.show` gives it: text if printed, an image in a notebook."""

    def __init__(self, mask: SeesPairs, seqlen: int, ranges: NamedRanges, seqlen_q: int | None) -> None:
        self.mask, self.seqlen, self.ranges, self.seqlen_q = mask, seqlen, ranges, seqlen_q

    def image(self, *, cell: float | None = None, tiles: Sequence[DrawnTile] = ()) -> Image:
        """As a Pillow image; arguments as in `mask_image`."""
        return mask_image(
            self.mask, seqlen_k=self.seqlen, ranges=self.ranges, seqlen_q=self.seqlen_q, cell=cell, tiles=tiles
        )

    def __repr__(self) -> str:
        return mask_text(self.mask, seqlen_k=self.seqlen, ranges=self.ranges, seqlen_q=self.seqlen_q)

    def save(self, path: str | os.PathLike[str], *, cell: float | None = None, tiles: Sequence[DrawnTile] = ()) -> None:
        """Write the image to a file, in the format of its suffix; arguments as in `mask_image`."""
        self.image(cell=cell, tiles=tiles).save(path)

    def _repr_png_(self) -> bytes | None:
        file = io.BytesIO()
        try:
            self.image().save(file, "PNG")
        except ImportError:  # without Pillow a notebook shows the text
            return None
        return file.getvalue()


def mask_text(mask: SeesPairs, *, seqlen_k: int, ranges: NamedRanges = None, seqlen_q: int | None = None) -> str:
    """The mask of one sequence as text: one line per query, one character per key, then a legend.

    Args:
        mask: the mask.
        seqlen_k: keys of the sequence, in tokens.
        ranges: half-open `(start, end)` key positions, or a dictionary of them for a mask that reads several sets.
        seqlen_q: the queries are the last `seqlen_q` of the `seqlen_k` positions; None: all of them.
    """
    rows, sets = _sequence(mask, seqlen_q, seqlen_k, ranges)
    states = _pair_states(mask, rows, seqlen_k, sets)
    step = -(-max(states.shape) // TEXT_WIDTH)
    if step > 1:
        states = _shrunk(states, step)
    lines = ["".join(LETTERS[state] for state in row) for row in states.tolist()]
    legend = f"{LETTERS[VISIBLE]} visible, {LETTERS[SPAN]} visible because of a span, {LETTERS[HIDDEN]} hidden"
    if step > 1:
        legend += f", {LETTERS[MIXED]} some of each; a character is {step} x {step} pairs"
    return "\n".join([*lines, legend])


def _shrunk(states: torch.Tensor, step: int) -> torch.Tensor:
    """One state for every `step` x `step` pairs; `MIXED` where they differ."""
    rows, columns = (-(-size // step) for size in states.shape)
    down = torch.nn.functional.pad(states, (0, 0, 0, rows * step - states.shape[0]), value=255)
    padded = torch.nn.functional.pad(down, (0, columns * step - states.shape[1]), value=255)
    blocks = padded.view(rows, step, columns, step)
    largest = blocks.masked_fill(blocks == 255, 0).amax(dim=(1, 3))
    return torch.where(blocks.amin(dim=(1, 3)) == largest, largest, MIXED)


def mask_image(
    mask: SeesPairs,
    *,
    seqlen_k: int,
    ranges: NamedRanges = None,
    seqlen_q: int | None = None,
    cell: float | None = None,
    tiles: Sequence[DrawnTile] = (),
) -> Image:
    """The mask of one sequence as an RGB image with axes, span markers and a legend.

    Args:
        mask, seqlen_k, ranges, seqlen_q: as for `mask_text`.
        cell: pixels per token, below 1 for long sequences; None: the keys are at most 600 pixels wide.
        tiles: tiles to draw as well, from `geometry.drawn_tiles`.
    """
    rows, sets = _sequence(mask, seqlen_q, seqlen_k, ranges)
    marked = sorted(span for own in sets.values() for span in own)
    if cell is None:
        cell = 600 / seqlen_k if seqlen_k > 600 else 600 // max(seqlen_k, 1)
    plot = _plot(_pair_states(mask, rows, seqlen_k, sets), cell, tiles)
    lines = [[(VISIBLE, VISIBLE, "without spans"), (SPAN, SPAN, "because of a span"), (HIDDEN, HIDDEN, "hidden")]]
    if tiles:
        kinds = [kind for _, kind in tiles]
        full = (TILES["full"] + SPAN, TILES["full"] + VISIBLE, f"{kinds.count('full')} tiles full: no mask needed")
        partial = (HIDDEN, VISIBLE, f"{kinds.count('partial')} partial")
        skipped = TILES["skipped"]
        lines.append([full, partial, (skipped, skipped, f"{kinds.count('skipped')} skipped")])
    width = max(plot.width, 440 if tiles else 330)  # room for the legend
    image, draw = _canvas(MARGIN + width + 26, MARGIN + plot.height + 14 + len(lines) * LINE)
    image.paste(plot, (MARGIN, MARGIN))
    _axis(draw, (0, seqlen_k), marked, cell, down=False)
    _axis(draw, (first_query(rows, seqlen_k), seqlen_k), marked, cell, down=True)
    for row, entries in enumerate(lines):
        _legend(draw, entries, MARGIN + plot.height + 14 + row * LINE)
    return image


def side_by_side(images: Sequence[Image], titles: Sequence[str]) -> Image:
    """One RGB image: the images in a row, tops aligned, each under its title (lines split at newlines)."""
    gap, size = 28, 20
    top = 14 + max(title.count("\n") + 1 for title in titles) * (size + 6)
    width, height = sum(image.width + gap for image in images), max(image.height for image in images)
    result, draw = _canvas(gap + width, top + height + 12)
    x = gap
    for image, title in zip(images, titles, strict=True):
        draw.multiline_text((x, 10), title, INK, _pillow()[2].load_default(size), spacing=6)
        result.paste(image, (x, top))
        x += image.width + gap
    return result


def _pillow() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError(f"pictures need Pillow ({install_hint('pictures')})") from error
    return Image, ImageDraw, ImageFont


def _canvas(width: int, height: int) -> tuple[Image, ImageDraw]:
    image, draw, font = _pillow()
    canvas = image.new("RGB", (width, height), WHITE)
    pen = draw.Draw(canvas)
    pen.font = font.load_default(15)
    return canvas, pen


def _sequence(mask: SeesPairs, seqlen_q: int | None, seqlen_k: int, ranges: NamedRanges) -> tuple[int, Sets]:
    """(query rows, checked spans) of the one sequence."""
    return seqlen_k if seqlen_q is None else seqlen_q, one_sequence(mask, ranges, seqlen_k)


def _pair_states(mask: SeesPairs, rows: int, keys: int, sets: Sets) -> torch.Tensor:
    """`(seqlen_q, seqlen_k)` uint8: HIDDEN, VISIBLE or SPAN."""
    visible = dense_mask(mask, rows, keys, sets)
    without_spans = dense_mask(mask, rows, keys, dict.fromkeys(sets, ()))
    return torch.where(visible, torch.where(without_spans, VISIBLE, SPAN), HIDDEN).to(torch.uint8)


def _plot(states: torch.Tensor, cell: float, tiles: Sequence[DrawnTile]) -> Image:
    """The mask alone: a colour per pair, a grid where cells are large enough, tile borders."""
    for (left, top, right, bottom), kind in tiles:
        states[top:bottom, left:right] += TILES[kind]
    image, drawing, _ = _pillow()
    small = image.frombytes("P", states.shape[::-1], bytes(states.flatten().tolist()))
    small.putpalette(bytes.fromhex("".join(colour[1:] for colour in COLOURS)))
    width, height = round(states.shape[1] * cell), round(states.shape[0] * cell)
    plot: Image = small.convert("RGB").resize((width, height), image.Resampling.NEAREST)
    draw = drawing.Draw(plot)
    for along in range(1, max(states.shape)) if cell >= 5 else ():
        draw.line((along * cell, 0, along * cell, height), WHITE)
        draw.line((0, along * cell, width, along * cell), WHITE)
    for box, _ in tiles:
        left, top, right, bottom = (round(edge * cell) for edge in box)
        draw.rectangle((left, top, min(right, width - 1), min(bottom, height - 1)), outline=RULE)
    return plot


def _axis(draw: ImageDraw, extent: tuple[int, int], spans: SpanList, cell: float, *, down: bool) -> None:
    """Name, span markers, and the positions where spans begin and end, along the top or (`down`) along the left."""
    first, last = extent

    def at(position: int, across: int, back: int = 0) -> tuple[int, int]:
        along = MARGIN + round((position - first) * cell) - back
        return (across, along) if down else (along, across)

    seen = [(max(start, first), end) for start, end in spans if end > first]
    for start, end in seen:
        (x, y), (right, bottom) = at(start, MARGIN - 9), at(end, MARGIN - 5, back=3)
        draw.rectangle((x, y, max(x, right), max(y, bottom)), COLOURS[SPAN])
    before = first - 1000 / cell
    for position in sorted({first, last, *(border for span in seen for border in span)}):
        if (position - before) * cell >= (18 if down else 30):  # pixels a number needs
            draw.text(at(position, MARGIN - 13), str(position), INK, anchor="rm" if down else "mb")
            before = position
    draw.text((6 if down else MARGIN + 32, 6), "queries" if down else "keys", INK)
    # The font has no arrows.
    draw.polygon(((64, 11), (74, 11), (69, 20)) if down else ((140, 10), (140, 20), (149, 15)), INK)


def _legend(draw: ImageDraw, entries: Sequence[tuple[int, int, str]], y: int) -> None:
    """One line of swatches with their texts; a swatch shows two states, which may be the same."""
    x = MARGIN
    for upper, lower, text in entries:
        draw.rectangle((x, y, x + SWATCH, y + SWATCH), COLOURS[upper], RULE)
        if upper != lower:
            draw.polygon(((x, y), (x, y + SWATCH), (x + SWATCH, y + SWATCH)), COLOURS[lower], RULE)
        draw.text((x + SWATCH + 7, y + SWATCH / 2), text, INK, anchor="lm")
        x += SWATCH + 29 + round(draw.textlength(text))
