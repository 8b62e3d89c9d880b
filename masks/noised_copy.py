"""Training of block diffusion: a sequence beside a noised copy of itself, both in blocks of `b` tokens.

Block `i` of the noised copy sees itself in both directions and the clean blocks before `i`, what it has when it is
denoised. Block `i` of the clean copy sees the clean blocks up to and with `i`. So a noised row sees two intervals, a
clean row one, by arithmetic alone: nothing is evaluated per pair. One order of the two is `[noised | clean]`, of
language models, the other `[clean | noised]`, of video models ("teacher forcing").

In `models/bd3lm.py` and `models/video.py` this mask is that of models, with sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.integers import whole_number, whole_numbers
from fa4_prefixlm.batch.ranges import LARGEST
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.interval_lists import Intervals, normalised
from fa4_prefixlm.masks.protocols import Ahead, Pairs, Rows
from fa4_prefixlm.masks.spans import BatchSpans

NOISED, CLEAN = "noised", "clean"


def block_diffusion(block: int) -> Mask:
    """The mask of a noised and a clean copy, in blocks of `block` tokens.

    Block `i` of a copy is its tokens `[i * block, (i + 1) * block)`; the last may be shorter. A row of block `i` of
    "noised" sees that block, and the blocks before `i` of "clean"; a row of block `i` of "clean" sees those up to `i`.
    Tokens in neither (padding) see nothing and are not seen.

    Ranges are one span of each name per sequence: `noised_and_clean(lengths)`. Of several "clean" spans in a sequence a
    noised row sees the blocks before `i` in each, so documents that are packed go into sequences of their own.

    Args:
        block: tokens of a block.

    Raises:
        InputError: `block` is no positive number of tokens.
    """
    return BlockDiffusion(whole_number("block", block, "a positive number of tokens", least=1))


def noised_and_clean(lengths: Sequence[int], *, first: str = NOISED) -> dict[str, BatchSpans]:
    """The ranges of sequences that are nothing but a noised and a clean copy.

    `noised_and_clean([100, 60])` is `{"noised": [[(0, 100)], [(0, 60)]], "clean": [[(100, 200)], [(60, 120)]]}`.

    Args:
        lengths: tokens of one copy, per sequence.
        first: the copy at the start, "noised" or "clean".

    Returns:
        by name, per sequence a list of one half-open `(start, end)`, or of none where the copy has no tokens.

    Raises:
        InputError: `lengths` are no numbers of tokens, or `first` is neither of the two.
    """
    if first not in (NOISED, CLEAN):
        raise InputError("first", f"{NOISED!r} or {CLEAN!r}", repr(first))
    known = whole_numbers("lengths", lengths, "a number of tokens, at least 0")
    halves: list[BatchSpans] = [
        [[(0, length)] if length else [] for length in known],
        [[(length, 2 * length)] if length else [] for length in known],
    ]
    return dict(zip((NOISED, CLEAN) if first == NOISED else (CLEAN, NOISED), halves, strict=True))


@dataclass(frozen=True, repr=False)
class BlockDiffusion(Mask):
    """See `block_diffusion`. A token that is in spans of both names is a noised one as a query."""

    block: int

    @property
    def names(self) -> frozenset[str]:
        return frozenset({NOISED, CLEAN})

    def count(self, spans: Mapping[str, int]) -> int:
        return 1 + spans[CLEAN]

    def intervals(self, rows: Rows) -> Intervals:
        (start, end), (clean_start, clean_end) = rows.span_of(NOISED), rows.span_of(CLEAN)
        is_noised, is_clean = end > 0, clean_end > 0
        block = min(self.block, LARGEST)
        # Tokens of the span's blocks before the row's own; 0 for rows outside.
        before = torch.where(is_noised, (rows.position - start) // block * block, 0)
        clean_before = torch.where(is_clean, (rows.position - clean_start) // block * block, 0)
        # Sums may not fit int32: what is added is cut to what is left of the span.
        block_start, clean_block = start + before, clean_start + clean_before
        block_end = block_start + (end - block_start).clamp(max=block)
        clean_block_end = clean_block + (clean_end - clean_block).clamp(max=block)
        own_lo = torch.where(is_noised, block_start, clean_start).unsqueeze(1)
        own_hi = torch.where(is_noised, block_end, clean_block_end).unsqueeze(1)
        lo, hi = rows.spans_of(CLEAN)
        earlier = lo + torch.minimum(before.unsqueeze(1), hi - lo)
        return normalised(torch.cat([own_lo, lo], dim=1), torch.cat([own_hi, earlier], dim=1))

    def visible(self, pairs: Pairs) -> torch.Tensor:
        query, key = pairs.query_offset(NOISED) // self.block, pairs.key_offset(NOISED) // self.block
        own = pairs.same_span(NOISED) & (query == key)
        clean_query, clean_key = pairs.query_offset(CLEAN) // self.block, pairs.key_offset(CLEAN) // self.block
        before = pairs.query_in(NOISED) & pairs.key_in(CLEAN) & (clean_key < query)
        clean = pairs.same_span(CLEAN) & (clean_key <= clean_query) & ~pairs.query_in(NOISED)
        return own | before | clean

    def ahead(self) -> Ahead:
        # A noised block may see clean ones that stand after all of the noised.
        return Ahead(spans=frozenset({NOISED, CLEAN}), everywhere=frozenset({CLEAN}))

    def __repr__(self) -> str:
        return f"block_diffusion({self.block})"
