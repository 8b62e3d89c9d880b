"""Make the pictures in docs/pictures again: `python docs/pictures.py`. Each is drawn from the library's own masks.

Those in docs/pictures/catalogue are one for each entry of `fa4_prefixlm.masks.models.catalogue`. Plots are of kept
results.
"""

from __future__ import annotations

import argparse
import pathlib
import textwrap
from typing import TYPE_CHECKING

from plots import plots

from fa4_prefixlm import PrefixLM
from fa4_prefixlm.geometry.drawn_tiles import drawn_tiles
from fa4_prefixlm.masks.models.catalogue import CATALOGUE
from fa4_prefixlm.masks.picture import mask_image, side_by_side

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = pathlib.Path(__file__).parent / "pictures"
SPANS = [(6, 24), (32, 46)]


def pictures() -> dict[str, Image]:
    """File name -> picture."""
    clamped, joined = PrefixLM(window=10), PrefixLM(window=10, clamp=False)
    windowed, spans = PrefixLM(window=256), [(40, 296), (400, 656)]
    cut = drawn_tiles(windowed, seqlen_k=768, ranges=spans, tile=(128, 64))
    tiles = mask_image(windowed, seqlen_k=768, ranges=spans, tiles=cut)
    return (
        {
            "causal.png": titled("No spans: causal", mask_image(PrefixLM(), seqlen_k=54)),
            "prefix_lm.png": titled("PrefixLM()", mask_image(PrefixLM(), seqlen_k=54, ranges=SPANS)),
            "window_clamp.png": titled("PrefixLM(window=10)", mask_image(clamped, seqlen_k=54, ranges=SPANS)),
            "window_joined.png": titled(
                "PrefixLM(window=10, clamp=False)", mask_image(joined, seqlen_k=54, ranges=SPANS)
            ),
            "chunked.png": titled(
                "PrefixLM(), the last 18 of 54 tokens are queries",
                mask_image(PrefixLM(), seqlen_k=54, seqlen_q=18, ranges=SPANS),
            ),
            "tiles.png": titled("PrefixLM(window=256), tiles of 128 queries and 64 keys", tiles),
        }
        | catalogue()
        | plots()
    )


def catalogue() -> dict[str, Image]:
    """File name -> picture, one an entry; the rule is its title."""
    return {
        f"catalogue/{name}.png": titled(
            textwrap.fill(repr(example.mask), 42),
            mask_image(example.mask, seqlen_k=example.seqlen, ranges=example.ranges, cell=7),
        )
        for name, example in CATALOGUE.items()
    }


def titled(title: str, image: Image) -> Image:
    return side_by_side([image], [title])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, help="folder to write to")
    folder = parser.parse_args(arguments).out
    (folder / "catalogue").mkdir(parents=True, exist_ok=True)
    for name, image in pictures().items():
        # Few colours, so a palette of 64 loses nothing that can be seen, and a file takes a few KB.
        image.quantize(64).save(folder / name, optimize=True)
        print(f"{folder / name}  {(folder / name).stat().st_size / 1024:.1f} KiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
