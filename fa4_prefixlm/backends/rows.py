"""What the native and two-pass kernels read of a batch: each row's interval, and each query tile's key tiles.

A mask in closed form on a GPU fills both in one Triton launch, which also checks the values that only the device knows.
So do bounds that are given, of which nothing is checked.
Any other mask takes the torch operations of `geometry`: the same result, by some fifty small operations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.device_checks import is_fake
from fa4_prefixlm.fa4.kernels.launch import PADDING
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.geometry.tiles import query_tiles, tile_runs, tile_slots
from fa4_prefixlm.geometry.traits import Traits
from fa4_prefixlm.masks.given import GivenRows

# Query tokens and keys of a tile, for who reads the bounds and no tiles.
ANY_TILE = (128, 128)


class KernelRows(NamedTuple):
    """int32 on the device.

    Attributes:
        bounds: `(total_q + PADDING, 2)`, `[lo, hi)` of each row, the padding 0.
        tiles: `(slots, 4)`, see `geometry.tiles.tile_slots`.
    """

    bounds: torch.Tensor
    tiles: torch.Tensor


def fills_in_one_launch(spec: CallSpec, traits: Traits, lengths: Lengths) -> bool:
    """The mask and the batch are of the kind that `kernels.row_update` fills."""
    if traits.closed_form is None or traits.intervals > 1 or lengths.more_queries or not lengths.is_bottom_right:
        return False
    return spec.device.type == "cuda" and lengths.key_start is None and not is_fake(lengths.cu_seqlens_q)


def kernel_bounds(batch: MaskedBatch) -> Bounds:
    """The bounds of the rows but for tags, from the one launch where the batch has it: then rows of padding follow."""
    if not batch.in_one_launch:
        return batch.untagged
    both = kernel_rows(batch, *ANY_TILE).bounds
    return Bounds(both.narrow(1, 0, 1), both.narrow(1, 1, 1))


def kernel_rows(batch: MaskedBatch, tokens: int, tile_n: int) -> KernelRows:
    """The rows of a mask of one interval a row. tokens, tile_n: query tokens and keys of a tile."""
    if batch.in_one_launch:
        from fa4_prefixlm.kernels.row_update import plan_rows

        form = batch.traits.closed_form
        assert form is not None
        spans = [batch.spans[own.span] for own in form.inside]
        return KernelRows(*plan_rows(form, batch.lengths, batch.keys, spans, tokens, tile_n, padding=PADDING))
    if isinstance(batch.mask, GivenRows) and batch.on_gpu:
        from fa4_prefixlm.kernels.given_rows import given_rows

        keys = batch.lengths.max_seqlen_k  # of each sequence
        return KernelRows(*given_rows(batch.mask.bounds, keys, tokens, tile_n, padding=PADDING))
    tiles = query_tiles(batch.lengths, tokens)
    runs = tile_runs(batch.bounds, tiles, tokens, tile_n)
    bounds = torch.cat([batch.bounds.lo, batch.bounds.hi], dim=1)
    padded = torch.nn.functional.pad(bounds, (0, 0, 0, PADDING))
    return KernelRows(padded, tile_slots(runs, tiles, batch.lengths, tokens))
