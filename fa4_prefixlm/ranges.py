"""What the user says: the bidirectional ranges of each sequence, and the only validation of them.

A range (span) is half-open, `[start, end)`, in absolute key positions of its sequence. Two adjacent ranges are two
spans: their tokens do not see each other forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import debugging
from .errors import InputError
from .lengths import Lengths, to_device

Ranges = torch.Tensor | Sequence[Sequence[tuple[int, int]]] | None
SequenceSpans = tuple[tuple[int, int], ...]
HostSpans = tuple[SequenceSpans, ...]


@dataclass(frozen=True)
class Spans:
    """The spans of a batch.

    values: `(batch, max_spans, 2)` int32 on the device, half-open `[start, end)`; rows `(0, 0)` are unused.
    host: the same, per sequence and sorted, where the host knows them, else None.
    longest: upper bound of a span's length in tokens, known on the host.
    """

    values: torch.Tensor
    host: HostSpans | None
    longest: int

    def on_host(self) -> HostSpans:
        """The spans per sequence; reads them from the device, which synchronises, where the host does not know them."""
        return self.host if self.host is not None else _used_rows(self.values)


def parse(ranges: Ranges, lengths: Lengths, max_range: int | None = None) -> Spans:
    """Check `ranges` against the batch and bring them to the device.

    Values on the host are checked here. Values on the device are checked on the device by an assertion that does not
    synchronise (a violation surfaces as a CUDA device-side assertion), and here as well in debug mode.
    """
    if max_range is not None and (not isinstance(max_range, int) or max_range < 1):
        raise InputError("max_range", "a positive number of tokens", max_range)
    if ranges is None:
        ranges = [()] * lengths.batch
    if isinstance(ranges, torch.Tensor):
        _check_tensor(ranges, lengths)
        on_host = ranges.device.type == "cpu" or debugging.enabled()
        host = _used_rows(ranges) if on_host else None
        if host is None:
            longest = lengths.max_seqlen_k if max_range is None else min(max_range, lengths.max_seqlen_k)
            _assert_on_device(ranges, lengths, longest)
            return Spans(ranges, None, longest)
        checked = _check_host(host, lengths, max_range)
        values = to_device(ranges, lengths.device)
    else:
        checked = _check_host(_as_pairs(ranges, lengths), lengths, max_range)
        values = to_device(_padded(checked), lengths.device)
    longest = max((end - start for spans in checked for start, end in spans), default=0)
    return Spans(values, checked, longest)


def _check_tensor(ranges: torch.Tensor, lengths: Lengths) -> None:
    if ranges.dtype != torch.int32:
        raise InputError("ranges", "dtype torch.int32", ranges.dtype)
    if ranges.ndim != 3 or ranges.shape[2] != 2:
        raise InputError("ranges", "shape (batch, max_ranges, 2)", tuple(ranges.shape))
    if ranges.shape[0] != lengths.batch:
        raise InputError("ranges", f"one row per sequence, {lengths.batch}", ranges.shape[0])
    if ranges.device.type != "cpu" and ranges.device != lengths.device:
        raise InputError("ranges", f"a tensor on the CPU or on q's device {lengths.device}", ranges.device)


def _as_pairs(ranges: Sequence[Sequence[tuple[int, int]]], lengths: Lengths) -> HostSpans:
    if len(ranges) != lengths.batch:
        raise InputError("ranges", f"one list per sequence, {lengths.batch}", f"{len(ranges)} lists")
    result = []
    for sequence, spans in enumerate(ranges):
        pairs = []
        for index, pair in enumerate(spans):
            try:
                start, end = pair
                pairs.append((start.__index__(), end.__index__()))
            except (TypeError, ValueError, AttributeError):
                raise InputError(f"ranges[{sequence}][{index}]", "a pair of integers (start, end)", pair) from None
        result.append(tuple(pairs))
    return tuple(result)


def _check_host(host: HostSpans, lengths: Lengths, max_range: int | None) -> HostSpans:
    result = []
    for sequence, spans in enumerate(host):
        for index, (start, end) in enumerate(spans):
            name = f"ranges[{sequence}][{index}]"
            if start < 0:
                raise InputError(name, "a start of at least 0", (start, end))
            if start >= end:
                raise InputError(name, "start below end", (start, end))
            if lengths.seqlens_k is not None and end > lengths.seqlens_k[sequence]:
                keys = lengths.seqlens_k[sequence]
                raise InputError(name, f"an end within the sequence's {keys} keys", (start, end))
            if max_range is not None and end - start > max_range:
                raise InputError(name, f"at most max_range = {max_range} tokens", (start, end))
        ordered = sorted(spans)
        for before, after in itertools.pairwise(ordered):
            if after[0] < before[1]:
                raise InputError(f"ranges[{sequence}]", "spans that do not overlap", f"{before} and {after}")
        result.append(tuple(ordered))
    return tuple(result)


def _assert_on_device(ranges: torch.Tensor, lengths: Lengths, longest: int) -> None:
    start, end = ranges.unbind(2)
    keys = lengths.cu_seqlens_k.diff().unsqueeze(1)
    used = (start != 0) | (end != 0)
    fine = (start >= 0) & (start < end) & (end <= keys) & (end - start <= longest)
    torch._assert_async(
        (fine | used.logical_not()).all(), "ranges: a span is reversed, ends past its keys or is longer than max_range"
    )
    order = torch.where(used, start, torch.iinfo(torch.int32).max).argsort(dim=1)
    start, end, used = start.gather(1, order), end.gather(1, order), used.gather(1, order)
    is_first = torch.arange(ranges.shape[1], device=ranges.device) == 0
    apart = start >= end.roll(1, dims=1)
    torch._assert_async((apart | is_first | used.logical_not()).all(), "ranges: two spans overlap")


def _used_rows(ranges: torch.Tensor) -> HostSpans:
    return tuple(tuple((start, end) for start, end in rows if (start, end) != (0, 0)) for rows in ranges.tolist())


def _padded(host: HostSpans) -> torch.Tensor:
    """`(batch, max_spans, 2)` int32 on the host, unused rows `(0, 0)`."""
    width = max((len(spans) for spans in host), default=0)
    rows = [[*spans, *[(0, 0)] * (width - len(spans))] for spans in host]
    return torch.tensor(rows, dtype=torch.int32).reshape(len(host), width, 2)
