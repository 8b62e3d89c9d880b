"""What the user says: the bidirectional ranges of each sequence, and the only validation of them.

A range (span) is half-open, `[start, end)`, in absolute key positions of its sequence. Two adjacent ranges are two
spans: their tokens do not see each other forward. A mask that reads several span sets gets them by name.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from fa4_prefixlm.batch.integers import as_int32, whole_number
from fa4_prefixlm.batch.lengths import Lengths, batched, first_query
from fa4_prefixlm.device_checks import assert_on_device, host_knows, to_device
from fa4_prefixlm.errors import InputError

Ranges = torch.Tensor | Sequence[Sequence[tuple[int, int]]] | None
NamedRanges = Ranges | Mapping[str, Ranges]
MaxRange = int | Mapping[str, int] | None
SequenceSpans = tuple[tuple[int, int], ...]
HostSpans = tuple[SequenceSpans, ...]
LARGEST = torch.iinfo(torch.int32).max
# What a chunk of a prefill must hold of a span set, for its rows to see all that they ever see: nothing (no row sees
# ahead of itself on its account); each span whole or not at all; all spans, if a query token is in one; all spans.
Whole = Literal["nothing", "span", "block", "all"]


class ReadsSpans(Protocol):
    """A mask, as far as its spans go; its `repr` names it in errors."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the span sets that it reads."""

    def whole(self, name: str) -> Whole:
        """What a chunk of a prefill must hold whole of the spans of `name`."""


@dataclass(frozen=True)
class Spans:
    """The spans of a batch.

    values: `(batch, max_spans, 2)` int32 on the device, half-open `[start, end)`; rows `(0, 0)` are unused.
    host: the same, per sequence and sorted, where the host knows them, else None.
    longest: upper bound of a span's length in tokens, known on the host.
    whole: what of them a chunk must hold.
    """

    values: torch.Tensor
    host: HostSpans | None
    longest: int
    whole: Whole = "span"

    def on_host(self) -> HostSpans:
        """The spans per sequence; reads them from the device, which synchronises, where the host does not know them."""
        return self.host if self.host is not None else _used_rows(self.values)

    def host_values(self) -> torch.Tensor:
        """The spans as `values` has them, but on the host."""
        return _padded(self.on_host())


SpanSets = Mapping[str, Spans]


def by_name(mask: ReadsSpans, ranges: NamedRanges) -> dict[str, Ranges]:
    """`ranges` as the mask reads them: one entry per name. A mask with a single name takes its ranges without it."""
    names = sorted(mask.names)
    if isinstance(ranges, Mapping):
        for name in names:
            if name not in ranges:
                raise InputError("ranges", f"spans for {name!r}, which {mask!r} reads", f"{sorted(ranges)}")
        for name in ranges:
            if name not in names:
                raise InputError(f"ranges[{name!r}]", f"only what {mask!r} reads: {names}", "spans it does not use")
        return dict(ranges)
    if len(names) == 1:
        return {names[0]: ranges}
    if ranges is not None and not names and not _is_empty(ranges):
        raise InputError("ranges", f"None: {mask!r} reads no spans", "spans it does not use")
    if names:
        raise InputError("ranges", f"a dictionary with spans for {names}, which {mask!r} reads", type(ranges).__name__)
    return {}


def _is_empty(ranges: Ranges) -> bool:
    """No sequence has a span, as far as lists say."""
    return isinstance(ranges, (list, tuple)) and all(isinstance(own, (list, tuple)) and not own for own in ranges)


def parse(mask: ReadsSpans, ranges: NamedRanges, lengths: Lengths, max_range: MaxRange = None) -> dict[str, Spans]:
    """Check `ranges` against the mask and the batch and bring them to the device.

    Values on the host are checked here, and in debug mode those on the device as well. What only the device can tell is
    for `assert_valid`.
    """
    named = by_name(mask, ranges)
    plain = not isinstance(ranges, Mapping)
    for name in max_range if isinstance(max_range, Mapping) else ():
        if name not in named:
            raise InputError(f"max_range[{name!r}]", f"a span set that {mask!r} reads: {sorted(named)}", "another name")
    return {
        name: _parse_set(
            "ranges" if plain else f"ranges[{name!r}]", given, lengths, _longest(name, max_range), mask.whole(name)
        )
        for name, given in named.items()
    }


def on_device(ranges: NamedRanges) -> bool:
    """Some of the values are where the host does not look, outside of debug mode."""
    sets = ranges.values() if isinstance(ranges, Mapping) else [ranges]
    return not all(map(host_knows, sets))


def to_tensors(
    mask: ReadsSpans, ranges: NamedRanges, batch: int, device: torch.device
) -> dict[str, torch.Tensor | None]:
    """The spans of each set of a mask as `(batch, max_ranges, 2)` int32 on the device, values unchecked.

    None: there are none.
    """
    plain = not isinstance(ranges, Mapping)
    return {
        name: _to_tensor("ranges" if plain else f"ranges[{name!r}]", own, batch, device)
        for name, own in by_name(mask, ranges).items()
    }


def _to_tensor(argument: str, ranges: Ranges, batch: int, device: torch.device) -> torch.Tensor | None:
    own = as_int32(argument, ranges)
    if own is None:
        return None
    if isinstance(own, torch.Tensor):
        _check_tensor(argument, own, batch, device)
    else:
        own = _padded(_as_pairs(argument, own, batch))
    return to_device(own, device) if own.shape[1] else None


def one_sequence(mask: ReadsSpans, ranges: NamedRanges, seqlen_k: int) -> dict[str, SequenceSpans]:
    """The checked spans of a single sequence: `[(8, 24)]` or `{"image": [(8, 24)]}`."""
    sizes = batched(1, seqlen_k, seqlen_k, torch.device("cpu"))
    sets = parse(mask, {name: _as_batch(own) for name, own in by_name(mask, ranges).items()}, sizes)
    return {name: own.on_host()[0] for name, own in sets.items()}


def _as_batch(spans: object) -> Ranges:
    """The spans of one sequence as those of a batch of one."""
    return None if spans is None else [spans]  # type: ignore[list-item]


def _longest(name: str, max_range: MaxRange) -> int | None:
    value = max_range.get(name) if isinstance(max_range, Mapping) else max_range
    return None if value is None else whole_number("max_range", value, "a positive number of tokens", least=1)


def _parse_set(argument: str, ranges: Ranges, lengths: Lengths, max_range: int | None, whole: Whole) -> Spans:
    if ranges is None:
        ranges = [()] * lengths.batch
    ranges = as_int32(argument, ranges)
    if isinstance(ranges, torch.Tensor):
        _check_tensor(argument, ranges, lengths.batch, lengths.device)
        if not host_knows(ranges):
            longest = lengths.max_seqlen_k if max_range is None else min(max_range, lengths.max_seqlen_k)
            return Spans(ranges.clone(), None, longest, whole)  # the plan's own, as its lengths are
        checked = _check_host(argument, _used_rows(ranges), lengths, max_range, whole)
        values = _later() if lengths.deferred else to_device(ranges, lengths.device)
    else:
        checked = _check_host(argument, _as_pairs(argument, ranges, lengths.batch), lengths, max_range, whole)
        values = _later() if lengths.deferred else to_device(_padded(checked), lengths.device)
    longest = max((end - start for spans in checked for start, end in spans), default=0)
    return Spans(values, checked, longest, whole)


def assert_valid(spans: Spans, lengths: Lengths) -> None:
    """Check what the host cannot tell of spans by an assertion on the device, which does not synchronise.

    That is their values, or whether the keys of their sequences end within one. A violation surfaces as a CUDA
    device-side assertion.
    """
    if spans.host is None:
        _assert_on_device(spans.values, lengths, spans.longest, spans.whole)
    elif lengths.seqlens_k is None:
        _assert_on_device(spans.values, lengths, None, spans.whole)


def _check_tensor(argument: str, ranges: torch.Tensor, batch: int, device: torch.device) -> None:
    if ranges.dtype != torch.int32:
        raise InputError(argument, "dtype torch.int32", ranges.dtype)
    if ranges.ndim != 3 or ranges.shape[2] != 2:
        raise InputError(argument, "shape (batch, max_ranges, 2)", tuple(ranges.shape))
    if ranges.shape[0] != batch:
        raise InputError(argument, f"one row per sequence, {batch}", ranges.shape[0])
    if ranges.device.type != "cpu" and ranges.device != device:
        raise InputError(argument, f"a tensor on the CPU or on q's device {device}", ranges.device)


def _as_pairs(argument: str, ranges: Sequence[Sequence[tuple[int, int]]], batch: int) -> HostSpans:
    if not isinstance(ranges, Sequence) or isinstance(ranges, str):
        raise InputError(argument, "an int32 tensor, or a list of spans per sequence", type(ranges).__name__)
    if len(ranges) != batch:
        first = ranges[0] if len(ranges) else ()
        pairs = isinstance(first, Sequence) and len(first) == 2 and isinstance(first[0], int)
        hint = ": pairs; one list of pairs per sequence is wanted, [[(2, 6)]] and not [(2, 6)]" if pairs else ""
        raise InputError(argument, f"one list per sequence, {batch}", f"{len(ranges)}{hint}")
    return tuple(_pairs(f"{argument}[{sequence}]", spans) for sequence, spans in enumerate(ranges))


def check_pairs(argument: str, spans: object) -> SequenceSpans:
    """The spans of one sequence, `[(start, end), ...]` with `0 <= start < end`."""
    pairs = _pairs(argument, spans)
    for pair in pairs:
        if not 0 <= pair[0] < pair[1]:
            raise InputError(argument, "pairs with 0 <= start < end", pair)
    return pairs


def _pairs(argument: str, spans: object) -> SequenceSpans:
    if not isinstance(spans, Iterable) or (isinstance(spans, torch.Tensor) and spans.ndim == 0):
        raise InputError(argument, "a list of pairs (start, end)", spans)
    if isinstance(spans, torch.Tensor):  # unused rows are (0, 0)
        spans = [pair for pair in spans.tolist() if pair != [0, 0]]
    pairs = []
    for index, pair in enumerate(spans):
        try:
            start, end = pair
            if type(start) is not int or type(end) is not int:  # the usual case needs nothing more
                if isinstance(start, bool) or isinstance(end, bool):
                    raise TypeError
                start, end = operator.index(start), operator.index(end)
            pairs.append((start, end))
        except (TypeError, ValueError):
            raise InputError(f"{argument}[{index}]", "a pair of integers (start, end)", _hinted(pair)) from None
    return tuple(pairs)


def _hinted(pair: object) -> object:
    """What came in place of a pair, with what was probably meant."""
    if isinstance(pair, int):
        return f"{pair}: one list of pairs per sequence is wanted, [[(2, 6)]] and not [(2, 6)]"
    if isinstance(pair, Sequence) and pair and isinstance(pair[0], Sequence) and not isinstance(pair, str):
        return f"{pair}: one list too many, the spans of one sequence are a list such as [(4, 260)]"
    return pair


def _check_host(
    argument: str, host: HostSpans, lengths: Lengths, max_range: int | None, whole: Whole = "span"
) -> HostSpans:
    result = []
    for sequence, spans in enumerate(host):
        for index, (start, end) in enumerate(spans):
            if not 0 <= start < end <= LARGEST or (max_range is not None and end - start > max_range):
                raise _bad_span(f"{argument}[{sequence}][{index}]", start, end, max_range)
        ordered = tuple(sorted(spans))
        for before, after in itertools.pairwise(ordered):
            if after[0] < before[1]:
                raise InputError(f"{argument}[{sequence}]", "spans that do not overlap", f"{before} and {after}")
        if lengths.seqlens_k is not None:  # else only the device knows what is here
            rows = None if lengths.seqlens_q is None else lengths.seqlens_q[sequence]
            _check_whole(f"{argument}[{sequence}]", ordered, rows, lengths.seqlens_k[sequence], whole)
        result.append(ordered)
    return tuple(result)


def _bad_span(argument: str, start: int, end: int, max_range: int | None) -> InputError:
    """Says which of the conditions of `_check_host` a span breaks, which checks them all at once."""
    if start < 0:
        expected = "a start of at least 0"
    elif start >= end:
        expected = "start below end"
    elif end > LARGEST:
        expected = f"positions of at most {LARGEST}, int32"
    else:
        expected = f"at most max_range = {max_range} tokens"
    return InputError(argument, expected, (start, end))


def _check_whole(argument: str, spans: SequenceSpans, rows: int | None, keys: int, whole: Whole) -> None:
    """Refuse spans that the keys end within, where rows would miss the keys to come. rows: None if not known."""
    if whole == "nothing" or not spans or spans[-1][1] <= keys or rows == 0:
        return
    if whole == "span":
        for start, end in spans:
            if start < keys < end:
                hint = "a chunk holds a span whole or not at all, see safe_chunk_end"
                raise InputError(
                    argument, f"spans that end within the {keys} keys, or begin after them", f"{(start, end)}; {hint}"
                )
        return
    first = 0 if rows is None else first_query(rows, keys)
    if whole == "all" or any(start < keys and end > first for start, end in spans):
        what = "the chunk that holds a token of one" if whole == "block" else "the first chunk"
        hint = f"the mask makes one block of all spans: {what} holds them all, see safe_chunk_end"
        raise InputError(argument, f"spans that end within the {keys} keys", f"{spans[-1]}; {hint}")


def _assert_on_device(ranges: torch.Tensor, lengths: Lengths, longest: int | None, whole: Whole) -> None:
    start, end = ranges.unbind(2)
    rows, keys = (own.diff().unsqueeze(1) for own in (lengths.cu_seqlens_q, lengths.cu_seqlens_k))
    used = (start != 0) | (end != 0)
    fine = (start >= 0) & (start < end)
    if longest is not None:
        fine &= torch.minimum(end, keys) - start <= longest
    past = (end > keys) & (rows > 0)  # where there is no row, none misses the keys to come
    if whole == "span":
        fine &= (start >= keys) | past.logical_not()
    elif whole == "block":
        held = used & (start < keys) & (end > lengths.query_starts().unsqueeze(1))
        fine &= (past & held.any(1, keepdim=True)).logical_not()
    elif whole == "all":
        fine &= past.logical_not()
    assert_on_device(
        (fine | used.logical_not()).all(),
        "ranges: a span is reversed, is cut by the end of its keys, or is longer than max_range",
    )
    order = torch.where(used, start, torch.iinfo(torch.int32).max).argsort(dim=1)
    start, end, used = start.gather(1, order), end.gather(1, order), used.gather(1, order)
    is_first = torch.arange(ranges.shape[1], device=ranges.device) == 0
    apart = start >= end.roll(1, dims=1)
    assert_on_device((apart | is_first | used.logical_not()).all(), "ranges: two spans overlap")


def _used_rows(ranges: torch.Tensor) -> HostSpans:
    return tuple(tuple((start, end) for start, end in rows if (start, end) != (0, 0)) for rows in ranges.tolist())


def _later() -> torch.Tensor:
    """In the place of values that are still to be brought to the device."""
    return torch.empty(0, 0, 2, dtype=torch.int32, device="cpu")


def flat_values(host: HostSpans) -> tuple[list[int], int]:
    """(the edges of all spans, sequence by sequence, unused rows `(0, 0)`; spans of a sequence, at most)."""
    width = max((len(spans) for spans in host), default=0)
    flat: list[int] = []
    for spans in host:
        for span in spans:
            flat += span
        flat += (0, 0) * (width - len(spans))
    return flat, width


def _padded(host: HostSpans) -> torch.Tensor:
    """`(batch, max_spans, 2)` int32 on the host, unused rows `(0, 0)`."""
    flat, width = flat_values(host)
    return torch.tensor(flat, dtype=torch.int32, device="cpu").reshape(len(host), width, 2)
