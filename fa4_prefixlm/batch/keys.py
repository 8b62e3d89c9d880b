"""Where the keys are that a kernel reads: contiguous in packed tensors, or in pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.device_checks import host_knows, to_device
from fa4_prefixlm.errors import InputError


@dataclass(frozen=True)
class Keys:
    """Where each sequence's keys are. One of two: contiguous, with `cu_seqlens_k`; in pages, with the other two.

    In pages of `size` tokens, key `i` of sequence `b` is row `i % size` of page `page_table[b, i // size]`.

    Attributes:
        max_seqlen_k: upper bound of a sequence's keys.
        cu_seqlens_k: `(batch + 1,)` int32 on the device, where the keys of each sequence begin.
        seqused_k: `(batch,)` int32 on the device, keys of each sequence.
        page_table: `(batch, max_pages)` int32 on the device. Entries past a sequence's last key are never read.
    """

    max_seqlen_k: int
    cu_seqlens_k: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    page_table: torch.Tensor | None = None

    @classmethod
    def contiguous(cls, lengths: Lengths) -> Keys:
        """Keys of packed tensors."""
        return cls(lengths.max_seqlen_k, cu_seqlens_k=lengths.cu_seqlens_k)

    @classmethod
    def in_pages(cls, page_table: torch.Tensor, lengths: Lengths, page_size: int, num_pages: int) -> Keys:
        """Keys of a cache of `num_pages` pages. Entries are checked where the host knows them and the lengths."""
        if lengths.seqlens_k is not None and host_knows(page_table):
            check_entries(page_table, lengths.seqlens_k, page_size, num_pages)
        table = to_device(page_table, lengths.device) if page_table.device != lengths.device else page_table.clone()
        return cls(lengths.max_seqlen_k, seqused_k=lengths.cu_seqlens_k.diff(), page_table=table.contiguous())


def check_entries(page_table: torch.Tensor, seqlens_k: tuple[int, ...], page_size: int, num_pages: int) -> None:
    """Refuse pages that the cache does not have, among those that hold keys."""
    for index, (row, keys) in enumerate(zip(page_table.tolist(), seqlens_k, strict=True)):
        for page in row[: -(-keys // page_size)]:
            if not 0 <= page < num_pages:
                raise InputError(f"page_table[{index}]", f"pages of 0 to {num_pages - 1}", page)


def check_table(page_table: object, batch: int, device: torch.device) -> torch.Tensor:
    """The page table, as far as it can be checked without its values."""
    if not isinstance(page_table, torch.Tensor):
        raise InputError("page_table", "an int32 tensor (batch, max_pages)", type(page_table).__name__)
    if page_table.dtype != torch.int32:
        raise InputError("page_table", "dtype torch.int32", page_table.dtype)
    if page_table.ndim != 2 or page_table.shape[0] != batch or page_table.shape[1] == 0:
        raise InputError("page_table", f"shape ({batch}, max_pages)", tuple(page_table.shape))
    if page_table.device.type != "cpu" and page_table.device != device:
        raise InputError("page_table", f"a tensor on the CPU or on q's device {device}", page_table.device)
    return page_table
