"""Keys and values in pages: which page holds which keys of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import debugging
from .errors import InputError
from .lengths import Lengths, to_device


@dataclass(frozen=True)
class Pages:
    """Key `i` of sequence `b` is row `i % size` of page `table[b, i // size]`.

    table: `(batch, max_pages)` int32 on the device. Entries past a sequence's last key are never read.
    seqused_k: `(batch,)` int32 on the device, keys of each sequence.
    """

    table: torch.Tensor
    seqused_k: torch.Tensor
    size: int


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


def pages(page_table: torch.Tensor, lengths: Lengths, size: int, num_pages: int) -> Pages:
    """The pages of a batch. Entries are checked where the host knows them and the lengths (or in debug mode)."""
    if lengths.seqlens_k is not None and (page_table.device.type == "cpu" or debugging.enabled()):
        for index, (row, keys) in enumerate(zip(page_table.tolist(), lengths.seqlens_k, strict=True)):
            for page in row[: -(-keys // size)]:
                if not 0 <= page < num_pages:
                    raise InputError(f"page_table[{index}]", f"pages of 0 to {num_pages - 1}", page)
    table = to_device(page_table, lengths.device) if page_table.device != lengths.device else page_table.clone()
    return Pages(table.contiguous(), lengths.cu_seqlens_k.diff(), size)
