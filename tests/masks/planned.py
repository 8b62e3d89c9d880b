"""A mask as a plan has it."""

from __future__ import annotations

import torch

import fa4_prefixlm as fp


def visible_by_bounds(mask: fp.Mask, spans: object, keys: int, rows: int) -> torch.Tensor:
    """The mask of one sequence as a plan has it: from its intervals, and the block beside them."""
    named = {name: [own, []] for name, own in spans.items()} if isinstance(spans, dict) else [spans, []]
    q, k = torch.zeros(2, rows, 1, 8), torch.zeros(2, keys, 1, 8)
    bounds = fp.plan(named if mask.names else None, like=(q, k, k), mask=mask).bounds
    kv = torch.arange(keys)
    visible = ((kv >= bounds.lo[:rows, :, None]) & (kv < bounds.hi[:rows, :, None])).any(1)
    if bounds.tags is not None:
        visible |= bounds.tags.row_tag[:rows, None] == bounds.tags.key_tag[None, :keys]
    return visible
