"""Random token types."""

from __future__ import annotations

import random


def random_types(rng: random.Random, keys: int, values: tuple[int, ...]) -> list[int]:
    """Runs of 1 to 12 tokens, so that many touch, reach an end of the row or are longer than the window."""
    row: list[int] = []
    while len(row) < keys:
        row += [rng.choice(values)] * rng.choice([1, 2, 3, 6, 12])
    return row[:keys]
