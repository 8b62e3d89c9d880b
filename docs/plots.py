"""Plots of kept results, drawn by `docs/pictures.py`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
# Of this library's backends, and of vLLM's.
COLOURS = {
    "FA4_PREFIXLM": "#1f6fb4",
    "FA4_PREFIXLM_ALL": "#7fb3dd",
    "FLASH_ATTN": "#f0a030",
    "TRITON_FLASH_ATTN": "#9a9a9a",
    "TRITON_ATTN": "#c8c8c8",
}
TITLES = {"gemma3": "Gemma 3 4B widths", "gemma4": "Gemma 4 widths"}
BAR, GAP, LEFT, WIDTH, RIGHT, TOP = 16, 14, 190, 520, 90, 64


def plots() -> dict[str, Image]:
    """File name -> picture, one for each model of each kept result of `benchmarks/vllm_engine.py time`."""
    drawn: dict[str, Image] = {}
    for file in sorted(RESULTS.glob("*vllm-time*.json")):
        kept = json.loads(file.read_text())
        for model in dict.fromkeys(row["model"] for row in kept["results"]):
            drawn[f"vllm-first-token-{model}.png"] = first_token(kept, model)
    return drawn


def first_token(kept: dict[str, Any], model: str, images: Sequence[int] = (0, 8)) -> Image:
    """Bars of the time to the first token by length and number of images; shorter is better.

    Args:
        kept: what `benchmarks/vllm_engine.py time` wrote.
        model: of its rows.
        images: numbers of images to show.
    """
    from PIL import Image, ImageDraw, ImageFont

    groups: dict[str, dict[str, float]] = {}
    for count in images:
        for row in kept["results"]:
            name = row["workload"].removeprefix("first token, 1 x ")
            if row["model"] == model and name != row["workload"] and name.endswith(f", {count} images"):
                groups.setdefault(name, {})[row["backend"]] = row["ms"]
    height = TOP + sum(BAR * len(bars) + GAP for bars in groups.values())
    picture = Image.new("RGB", (LEFT + WIDTH + RIGHT, height), "white")
    draw, small = ImageDraw.Draw(picture), ImageFont.load_default(13)
    title = f"vLLM {kept['versions']['vllm']}, ms to the first token: {TITLES[model]}, {kept['layers']} layers"
    draw.text((10, 8), f"{title}, {kept['device']}", "black", font=ImageFont.load_default(15))
    at = 10
    for name, colour in COLOURS.items():
        draw.rectangle((at, 38, at + 11, 49), colour)
        draw.text((at + 16, 35), name, "black", font=small)
        at += 30 + int(draw.textlength(name, font=small))
    longest, y = max(max(bars.values()) for bars in groups.values()), TOP
    for name, bars in groups.items():
        draw.text((10, y + BAR * len(bars) / 2 - 8), name, "black", font=small)
        for backend, colour in COLOURS.items():
            if backend in bars:
                end = LEFT + WIDTH * bars[backend] / longest
                draw.rectangle((LEFT, y + 2, end, y + BAR - 2), colour)
                draw.text((end + 6, y), f"{bars[backend]:.1f}", "black", font=small)
                y += BAR
        y += GAP
    return picture
