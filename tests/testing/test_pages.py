"""Keys in pages that only the table leads to."""

from __future__ import annotations

import pytest
import torch

from fa4_prefixlm.testing.pages import NO_PAGE, SPARE_PAGES, shuffled_pages


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_only_the_table_leads_to_the_keys(page_size: int) -> None:
    seqlens = (0, 1, 16, 70, 0, 129)
    k, v = (torch.randn(sum(seqlens), 2, dim, dtype=torch.bfloat16) for dim in (8, 4))
    own = shuffled_pages(k, v, seqlens, page_size, seed=3)
    named: list[int] = []
    first = 0
    for row, keys in zip(own.table, seqlens, strict=True):
        pages = row[: -(-keys // page_size)].long()
        named += pages.tolist()
        for cache, contiguous in ((own.k, k), (own.v, v)):
            flat = cache[pages].flatten(0, 1)
            assert torch.equal(flat[:keys], contiguous[first : first + keys])
            assert (flat[keys:] == 0).all(), "the unused rows of a last page must be finite"
        assert (row[len(pages) :] == NO_PAGE).all()
        first += keys
    assert len(named) == len(set(named)), "no page is two sequences'"
    assert named != sorted(named)
    spare = sorted(set(range(len(own.k))) - set(named))
    assert len(spare) == SPARE_PAGES
    assert own.k[spare].isnan().all()
    assert own.v[spare].isnan().all()


def test_pages_are_the_same_for_the_same_seed() -> None:
    k = v = torch.randn(300, 1, 4)
    one, same, other = (shuffled_pages(k, v, [300], 16, seed=seed) for seed in ("a name", "a name", "another"))
    assert torch.equal(one.table, same.table)
    assert torch.equal(one.k.nan_to_num(7.0), same.k.nan_to_num(7.0))
    assert one.table.shape != other.table.shape or not torch.equal(one.table, other.table)
