"""What a caller says of a batch, as one value; the lengths and keys that follow from it; their way to the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fa4_prefixlm.batch import lengths
from fa4_prefixlm.batch.frozen import with_changes
from fa4_prefixlm.batch.integers import as_int32
from fa4_prefixlm.batch.keys import Keys, check_entries, check_table
from fa4_prefixlm.batch.lengths import CuSeqlens, Lengths
from fa4_prefixlm.batch.ranges import MaxRange, NamedRanges, Spans, SpanSets, flat_values
from fa4_prefixlm.batch.tensors import Cache, CallSpec
from fa4_prefixlm.device_checks import integers_to_device, to_device_together
from fa4_prefixlm.errors import InputError

CPU = torch.device("cpu")
_LENGTH_TENSORS = ("cu_seqlens_q", "cu_seqlens_k", "key_start", "query_start")


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
    def cache(self) -> Cache:
        """What `k` and `v` are: keys alone, a cache of pages, or a static one."""
        if self.page_table is not None:
            return "pages"
        return None if self.seqused_k is None else "static"

    @property
    def on_host(self) -> bool:
        """Every value is on the host. Then all are checked there first, and go to the device in one copy."""
        ranges = self.ranges.values() if isinstance(self.ranges, Mapping) else (self.ranges,)
        for value in (self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_k, self.page_table, *ranges):
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                return False
        return True

    def checked(self) -> BatchArguments:
        """The same with all integers as int32, where they fit."""
        given = (self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_k, self.page_table)
        if all(values is None or type(values) in (list, tuple) for values in given):
            return self
        cu_seqlens_q = as_int32("cu_seqlens_q", self.cu_seqlens_q)
        same = self.cu_seqlens_k is self.cu_seqlens_q
        return dataclasses.replace(
            self,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_q if same else as_int32("cu_seqlens_k", self.cu_seqlens_k),
            seqused_k=as_int32("seqused_k", self.seqused_k),
            page_table=as_int32("page_table", self.page_table),
        )

    def lengths(self, spec: CallSpec, *, more_queries: bool = False) -> Lengths:
        """The checked lengths of the batch, whose tensors are described by `spec`; on the CPU where `on_host`.

        more_queries: a sequence may have more queries than keys.
        """
        if spec.batched:
            self._refuse("cu_seqlens_q", "None with (batch, seqlen, heads, head_dim) tensors")
        device = CPU if self.on_host else spec.device
        if spec.page_size is not None:
            return self._cached_lengths(spec, device, more_queries)
        if spec.batched:
            self._refuse("cu_seqlens_k", "None with (batch, seqlen, heads, head_dim) tensors")
            batch, seqlen_q, seqlen_k = *spec.shape_q, spec.shape_k[1]
            lengths.check_upper_bound("max_seqlen_q", self.max_seqlen_q, (seqlen_q,))
            lengths.check_upper_bound("max_seqlen_k", self.max_seqlen_k, (seqlen_k,))
            if seqlen_q > seqlen_k and not more_queries:
                got = f"seqlen_q = {seqlen_q}{spec.swapped_hint()}"
                raise InputError("q", f"seqlen_q <= seqlen_k = {seqlen_k}", got)
            return lengths.batched(batch, seqlen_q, seqlen_k, device, more_queries=more_queries)
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
            device=device,
            more_queries=more_queries,
            deferred=self.on_host,
        )

    def on_device(self, spec: CallSpec, sizes: Lengths, spans: SpanSets) -> tuple[Lengths, dict[str, Spans], Keys]:
        """The batch on the device of `spec`: its lengths, its spans, and where its keys are."""
        if sizes.deferred:
            return self._made(spec, sizes, spans)
        table = self.page_table
        if spec.page_size is not None and table is None:  # a static cache
            table = torch.arange(sizes.batch, dtype=torch.int32, device=sizes.device).unsqueeze(1)
        if not self.on_host or spec.device.type == "cpu":
            return sizes, dict(spans), _keys(table, spec, sizes)
        fields = [name for name in _LENGTH_TENSORS if getattr(sizes, name) is not None]
        here = [*(getattr(sizes, name) for name in fields), *(own.values for own in spans.values())]
        if table is not None:
            assert sizes.seqlens_k is not None
            assert spec.page_size is not None
            check_entries(table, sizes.seqlens_k, spec.page_size, spec.shape_k[0])
            here += [torch.tensor(sizes.seqlens_k, dtype=torch.int32, device=CPU), table]
        there = to_device_together(here, spec.device)
        moved: dict[str, Any] = dict(zip(fields, there, strict=False))
        sizes = with_changes(sizes, **moved)
        values = zip(spans.items(), there[len(fields) :], strict=False)
        own_spans = {name: with_changes(own, values=tensor) for (name, own), tensor in values}
        if table is None:
            return sizes, own_spans, Keys.contiguous(sizes)
        return sizes, own_spans, Keys(sizes.max_seqlen_k, seqused_k=there[-2], page_table=there[-1])

    def _made(self, spec: CallSpec, sizes: Lengths, spans: SpanSets) -> tuple[Lengths, dict[str, Spans], Keys]:
        """The tensors of a deferred batch, in one copy of what the host knows."""
        assert sizes.seqlens_q is not None
        assert sizes.seqlens_k is not None
        flat = {name: flat_values(own.on_host()) for name, own in spans.items()}
        lists = [lengths.cumulative(sizes.seqlens_q), *(values for values, _ in flat.values())]
        if not sizes.same:
            lists.append(lengths.cumulative(sizes.seqlens_k))
        made = integers_to_device(lists, spec.device)
        sizes = with_changes(
            sizes, cu_seqlens_q=made[0], cu_seqlens_k=made[0] if sizes.same else made[-1], deferred=False
        )
        own_spans = {
            name: with_changes(own, values=values.view(sizes.batch, width, 2))
            for (name, own), (_, width), values in zip(spans.items(), flat.values(), made[1:], strict=False)
        }
        return sizes, own_spans, Keys.contiguous(sizes)

    def _cached_lengths(self, spec: CallSpec, device: torch.device, more_queries: bool) -> Lengths:
        assert spec.page_size is not None
        what = "a page_table" if self.page_table is not None else "seqused_k"
        self._refuse("cu_seqlens_k", f"None with {what} (seqused_k says how many keys there are)")
        cu_seqlens_q: CuSeqlens | None = self.cu_seqlens_q
        if spec.batched:
            cu_seqlens_q = [spec.shape_q[1] * index for index in range(spec.shape_q[0] + 1)]
        for name, value in (("cu_seqlens_q", cu_seqlens_q), ("seqused_k", self.seqused_k)):
            if value is None:
                raise InputError(name, f"int32 values with {what}", None)
            if not hasattr(value, "__len__"):
                raise InputError(name, "an int32 tensor or a list of integers", value)
        assert cu_seqlens_q is not None
        assert self.seqused_k is not None
        capacity = spec.page_size
        if self.page_table is not None:
            capacity *= check_table(self.page_table, len(cu_seqlens_q) - 1, spec.device).shape[1]
        elif spec.shape_k[0] != len(cu_seqlens_q) - 1:
            raise InputError(
                "k",
                f"a static cache of {len(cu_seqlens_q) - 1} sequences (or a page_table, for a cache of pages)",
                spec.shape_k[0],
            )
        return lengths.cached(
            cu_seqlens_q,
            self.seqused_k,
            total_q=math.prod(spec.shape_q),
            capacity=capacity,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
            device=device,
            more_queries=more_queries,
        )

    def _refuse(self, name: str, expected: str) -> None:
        value = getattr(self, name)
        if value is not None:
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise InputError(name, expected, shown)


def _keys(page_table: torch.Tensor | None, spec: CallSpec, sizes: Lengths) -> Keys:
    if page_table is None:
        return Keys.contiguous(sizes)
    assert spec.page_size is not None
    return Keys.in_pages(page_table, sizes, spec.page_size, spec.shape_k[0])
