"""Keys and values in pages that nothing but the page table leads to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SPARE_PAGES = 5
# A table entry past a sequence's last key: whoever follows it reads far outside the cache.
NO_PAGE = -(2**20)


@dataclass(frozen=True)
class ShuffledPages:
    """A cache whose pages are in random order among spare ones.

    Attributes:
        k: `(pages, page_size, heads, head_dim)`: NaN in the spare pages, 0 in the rows past a sequence's last key.
        v: The same for the values.
        table: `(batch, max_pages)` int32 on the host; entries past a sequence's last key are `NO_PAGE`.
    """

    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor

    @property
    def cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k, self.v


def shuffled_pages(
    k: torch.Tensor, v: torch.Tensor, seqlens_k: Sequence[int], page_size: int, *, seed: int | str
) -> ShuffledPages:
    """Put contiguous keys and values `(total_k, heads, head_dim)` into pages, on their device.

    Args:
        k: Keys of all sequences, one after the other.
        v: Values.
        seqlens_k: Keys of each sequence.
        page_size: Tokens of a page.
        seed: Decides the order of the pages, and by how much the table is wider than the longest sequence needs.
    """
    rng = random.Random(seed)
    counts = [-(-keys // page_size) for keys in seqlens_k]
    order = list(range(sum(counts) + SPARE_PAGES))
    rng.shuffle(order)
    table = torch.full((len(counts), max(1, *counts) + rng.randint(0, 3)), NO_PAGE, dtype=torch.int32)
    caches = [torch.full((len(order), page_size, *own.shape[1:]), float("nan")).to(own) for own in (k, v)]
    page = key = 0
    for row, keys, count in zip(table, seqlens_k, counts, strict=True):
        pages = torch.tensor(order[page : page + count], dtype=torch.long)
        row[:count] = pages
        for cache, contiguous in zip(caches, (k, v), strict=True):
            filled = contiguous.new_zeros(count * page_size, *contiguous.shape[1:])
            filled[:keys] = contiguous[key : key + keys]
            cache[pages.to(cache.device)] = filled.unflatten(0, (-1, page_size))
        page, key = page + count, key + keys
    return ShuffledPages(caches[0], caches[1], table)
