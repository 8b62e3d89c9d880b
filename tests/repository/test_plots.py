"""The plots of kept results."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "docs"))
import plots


def kept() -> dict[str, object]:
    """As `benchmarks/vllm_engine.py time` writes it."""
    rows = [
        {"model": "gemma3", "workload": f"first token, 1 x {tokens} tokens, {images} images", "backend": name, "ms": ms}
        for tokens, scale in ((4096, 1), (8192, 2))
        for images in (0, 8, 32)
        for name, ms in (("FA4_PREFIXLM", 10.0 * scale), ("TRITON_ATTN", 20.0 * scale))
    ]
    rows.append({"model": "gemma3", "workload": "decode, 8 mixed", "backend": "TRITON_ATTN", "tokens/s": 1e9})
    return {"device": "a GPU", "versions": {"vllm": "0.33.0"}, "layers": 6, "results": rows}


def test_bars_are_as_long_as_their_times() -> None:
    pytest.importorskip("PIL")
    picture = plots.first_token(kept(), "gemma3")
    counted = picture.getcolors(1 << 24)
    by_colour = {f"#{bytes(colour).hex()}": count for count, colour in counted}
    mine, theirs = (by_colour[plots.COLOURS[name]] for name in ("FA4_PREFIXLM", "TRITON_ATTN"))
    legend = 12 * 12
    assert (theirs - legend) / (mine - legend) == pytest.approx(2, rel=0.02)
    groups = 4  # two lengths, with 0 and 8 images
    assert picture.height == plots.TOP + groups * (2 * plots.BAR + plots.GAP)
