"""Where a chunk of a prompt may end."""

from __future__ import annotations

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.testing.batches import Batch


def paged(batch: Batch, page_size: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64):
    q, k, v = batch.tensors((4, 2), (16, 24), dtype, "cpu", seed)
    return q, k, v, batch.in_pages(k, v, page_size, seed)


@pytest.mark.parametrize(
    ("position", "spans", "end"),
    [
        (100, [], 100),
        (100, [(0, 100), (100, 200)], 100),
        (100, [(40, 101)], 40),
        (100, [(99, 300)], 99),
        (100, [(0, 101)], 0),
        (41, [(60, 70), (40, 50), (10, 41)], 10),
        (0, [(0, 9)], 0),
    ],
)
def test_safe_chunk_end(position: int, spans: list[tuple[int, int]], end: int) -> None:
    assert fp.safe_chunk_end(position, spans) == end


def test_safe_chunks_are_accepted_by_a_plan() -> None:
    """What the helper returns, `plan` takes; a position inside a span it refuses."""
    spans = [(5, 30), (30, 31), (50, 90)]
    for position in range(1, 101):
        end = fp.safe_chunk_end(position, spans)
        assert end <= position
        cut = any(start < position < stop for start, stop in spans)
        assert (end < position) == cut
        for keys, refused in ((end, False), (position, cut)):
            if keys == 0:
                continue
            q, _, _, pages = paged(Batch(((1, keys),), ((),)))
            given = {"cu_seqlens_q": [0, 1], "seqused_k": [keys], "page_table": pages.table}
            if refused:
                with pytest.raises(fp.InputError):
                    fp.plan([spans], like=(q, pages.k, pages.v), **given)
            else:
                fp.plan([spans], like=(q, pages.k, pages.v), **given)
    for bad in ((-1, []), (1.5, []), (3, [(4, 2)])):
        with pytest.raises(fp.InputError):
            fp.safe_chunk_end(*bad)
