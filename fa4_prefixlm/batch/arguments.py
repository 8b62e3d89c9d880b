"""What a caller says of a batch, as one value, and the lengths and keys that follow from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fa4_prefixlm.batch import lengths
from fa4_prefixlm.batch.keys import Keys, check_table
from fa4_prefixlm.batch.lengths import CuSeqlens, Lengths
from fa4_prefixlm.batch.ranges import MaxRange, NamedRanges
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.errors import InputError


@dataclass(frozen=True)
class BatchArguments:
    """The arguments of `plan` that describe a batch, as they were given. See `plan` for what each means."""

    ranges: NamedRanges = None
    cu_seqlens_q: CuSeqlens | None = None
    cu_seqlens_k: CuSeqlens | None = None
    seqused_k: CuSeqlens | None = None
    page_table: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    max_range: MaxRange = None

    @property
    def paged(self) -> bool:
        """Keys are in pages."""
        return self.page_table is not None

    def given(self) -> dict[str, object]:
        """The arguments beside `ranges`, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "ranges"}

    def check_together(self) -> None:
        """Refuse arguments that make no sense without others."""
        if self.seqused_k is not None and not self.paged:
            raise InputError("seqused_k", "a page_table beside it", "none")

    def lengths(self, spec: CallSpec) -> Lengths:
        """The checked lengths of the batch, whose tensors are described by `spec`."""
        if self.paged:
            return self._paged_lengths(spec)
        if spec.batched:
            for name, value in (("cu_seqlens_q", self.cu_seqlens_q), ("cu_seqlens_k", self.cu_seqlens_k)):
                if value is not None:
                    raise InputError(name, "None with (batch, seqlen, heads, head_dim) tensors", "a value")
            return lengths.batched(spec.shape_q[0], spec.shape_q[1], spec.shape_k[1], spec.device)
        for name, value in (("cu_seqlens_q", self.cu_seqlens_q), ("cu_seqlens_k", self.cu_seqlens_k)):
            if value is None:
                raise InputError(name, "(batch + 1,) int32 with packed (total, heads, head_dim) tensors", None)
        assert self.cu_seqlens_q is not None
        assert self.cu_seqlens_k is not None
        return lengths.packed(
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            total_q=spec.shape_q[0],
            total_k=spec.shape_k[0],
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
            device=spec.device,
        )

    def keys(self, spec: CallSpec, sizes: Lengths) -> Keys:
        """Where the keys of the batch are."""
        if self.page_table is None:
            return Keys.contiguous(sizes)
        assert spec.page_size is not None
        return Keys.in_pages(self.page_table, sizes, spec.page_size, spec.shape_k[0])

    def _paged_lengths(self, spec: CallSpec) -> Lengths:
        assert spec.page_size is not None
        if self.cu_seqlens_k is not None:
            expected = "None with a page_table (seqused_k says how many keys there are)"
            raise InputError("cu_seqlens_k", expected, "a value")
        for name, value in (("cu_seqlens_q", self.cu_seqlens_q), ("seqused_k", self.seqused_k)):
            if value is None:
                raise InputError(name, "int32 values with a page_table", None)
            if not hasattr(value, "__len__"):
                raise InputError(name, "an int32 tensor or a list of integers", value)
        assert self.cu_seqlens_q is not None
        assert self.seqused_k is not None
        table = check_table(self.page_table, len(self.cu_seqlens_q) - 1, spec.device)
        return lengths.paged(
            self.cu_seqlens_q,
            self.seqused_k,
            total_q=spec.shape_q[0],
            capacity=table.shape[1] * spec.page_size,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
            device=spec.device,
        )
