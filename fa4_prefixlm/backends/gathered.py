"""Keys copied out of their pages first, for backends that read contiguous keys. Exact for every mask and build.

Only keys that some query sees are copied: with a window, those of the chunk and those that it reaches before it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import MaskedBatch, Prepared
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.device_checks import is_fake
from fa4_prefixlm.geometry.tiles import TileCounts


@dataclass
class Gathered(Prepared):
    """Keys in pages, copied for a backend that reads contiguous ones.

    Attributes:
        inner: the backend's state, for the copied keys.
        pages: where the keys are.
        first_key: `(batch,)` int32, the first key of each sequence that is copied.
        lengths: of the copied keys.
    """

    inner: Prepared
    pages: Keys
    first_key: torch.Tensor
    lengths: Lengths

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from fa4_prefixlm.kernels.page_gather import gather_pages, gather_pages_torch

        keys, values = self._room(k), self._room(v)
        needs_grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        gather = gather_pages_torch if needs_grad else gather_pages  # autograd does not see what Triton copies
        assert self.pages.page_table is not None
        if not is_fake(q):
            gather(k, v, self.pages.page_table, self.first_key, self.lengths.cu_seqlens_k, keys, values)
        return self.inner.run(q, keys, values, options, out)

    def describe(self) -> list[tuple[str, str]]:
        most = "" if self.lengths.seqlens_k is not None else "at most "
        return [
            ("gather", f"{most}{self.lengths.total_k} keys out of the cache"),
            *self.inner.describe(),
        ]

    def tile_counts(self) -> TileCounts | None:
        return self.inner.tile_counts()

    def _room(self, cache: torch.Tensor) -> torch.Tensor:
        # Kernels also load the rest of a last tile and multiply it by 0, so rows that are not copied must be finite.
        make = torch.empty if self.lengths.seqlens_k is not None else torch.zeros
        return make(self.lengths.total_k, *cache.shape[2:], dtype=cache.dtype, device=cache.device)


def contiguous(batch: MaskedBatch, *, trim: bool) -> tuple[MaskedBatch, torch.Tensor]:
    """The batch over copied keys, and the first key of each sequence to copy.

    Args:
        batch: the batch over pages.
        trim: copy only what the mask reaches. False: all keys, for backends that read positions and spans themselves.
    """
    left = batch.traits.reach.left if trim and batch.traits.banded else None
    lengths = batch.lengths
    keys, rows = batch.lengths.cu_seqlens_k.diff(), batch.lengths.cu_seqlens_q.diff()
    spec = dataclasses.replace(batch.spec, page_size=None)
    if left is None:
        inner = dataclasses.replace(batch, spec=spec, lengths=lengths, keys=Keys.contiguous(lengths))
        return inner, torch.zeros_like(keys)
    left = min(left, lengths.max_seqlen_k)  # nothing is further away, and int32 holds it
    first_key = (keys - rows - left).clamp(min=0)
    lengths = _without(lengths, first_key, left)
    return dataclasses.replace(batch, spec=spec, lengths=lengths, keys=Keys.contiguous(lengths)), first_key


def _without(lengths: Lengths, first_key: torch.Tensor, left: int) -> Lengths:
    """`lengths` without the keys before `first_key`; `left` is how far the mask reaches before a row."""
    seqlens_k, total = None, min(lengths.total_k, lengths.total_q + lengths.batch * left)
    if lengths.seqlens_q is not None and lengths.seqlens_k is not None:
        pairs = zip(lengths.seqlens_q, lengths.seqlens_k, strict=True)
        seqlens_k = tuple(keys - max(keys - rows - left, 0) for rows, keys in pairs)
        total = sum(seqlens_k)
    skipped = torch.nn.functional.pad(first_key.cumsum(0, dtype=torch.int32), (1, 0))
    return dataclasses.replace(
        lengths,
        cu_seqlens_k=lengths.cu_seqlens_k - skipped,
        total_k=total,
        max_seqlen_k=min(lengths.max_seqlen_k, lengths.max_seqlen_q + left),
        seqlens_k=seqlens_k,
        key_start=first_key,
    )
