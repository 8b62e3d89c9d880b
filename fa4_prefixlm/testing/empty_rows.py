"""Masks with rows that see nothing."""

from __future__ import annotations

import torch

from fa4_prefixlm.masks.prefix_lm import PrefixLM
from fa4_prefixlm.masks.protocols import Pairs, Rows


class Blind(PrefixLM):
    """PrefixLM, but the first 200 positions of a sequence and every third row after them see nothing."""

    no_empty_rows = False

    def intervals(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        lo, hi = super().intervals(rows)
        blind = ((rows.position < 200) | (rows.position % 3 == 0)).unsqueeze(1)
        return lo.masked_fill(blind, 5), hi.masked_fill(blind, 5)

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return super().visible(pairs) & (pairs.query >= 200) & (pairs.query % 3 != 0)


class ChainedBlind(Blind):
    """The same, with its tiles found from the extremes of each query tile's rows."""

    no_empty_rows = True
