"""Where a scheduler that prefills in chunks may end one: what a mask does with its spans decides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fa4_prefixlm.batch.integers import whole_number
from fa4_prefixlm.batch.ranges import SequenceSpans, check_pairs
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.base import Mask, ahead_of
from fa4_prefixlm.masks.prefix_lm import PrefixLM

SequenceRanges = Sequence[tuple[int, int]] | Mapping[str, Sequence[tuple[int, int]]] | None


def safe_chunk_end(position: int, ranges: SequenceRanges, mask: Mask = PrefixLM()) -> int:  # noqa: B008 (immutable)
    """The last position at or before `position` where a chunk may end, so that its rows see all that they ever see.

    That is `position` itself, or the start of what it would cut: a span whose tokens see each other, or with masks that
    make one block of all spans (`one_block`), the first of them. Spans that no row sees ahead into, such as documents
    or a prompt that is causal inside, may be cut anywhere. If the chunk begins at what may not be cut, no shorter chunk
    is possible:

        end = safe_chunk_end(begin + budget, ranges, mask)
        while end <= begin:  # what begins here is longer than the budget
            budget += 1
            end = safe_chunk_end(begin + budget, ranges, mask)

    Args:
        position: where the scheduler would end the chunk, in tokens from the start of the sequence.
        ranges: half-open `(start, end)` spans of the whole sequence, in any order, without overlaps; by name for a mask
            that reads several sets.
        mask: the layers' mask. Where layers differ, take the least of their ends.

    Returns:
        a position from 0 to `position`.

    Raises:
        InputError: the position is no position, the ranges are not pairs of one sequence, or some row of the mask sees
            to the end of the keys, so that no chunk but the last is safe (`from_flex`, windows that look right, and
            masks of your own that do not say how far they see ahead, `Mask.ahead`, are taken to).
    """
    position = whole_number("position", position, "a number of tokens, at least 0")
    if not isinstance(mask, Mask):
        raise InputError("mask", "a fa4_prefixlm mask such as PrefixLM(window=1024)", type(mask).__name__)
    if ahead_of(mask).keys:
        raise InputError("mask", "a mask of which no row sees to the end of the keys, to be prefilled in chunks", mask)
    uncut = [_uncut(mask, name, spans) for name, spans in _by_name(mask, ranges).items()]
    end = position
    while True:
        cut = min((start for own in uncut for start, stop in own if start < end < stop), default=end)
        if cut == end:
            return end
        end = cut


def _by_name(mask: Mask, ranges: SequenceRanges) -> dict[str, SequenceSpans]:
    if isinstance(ranges, Mapping):
        for name in mask.names:
            if name not in ranges:
                raise InputError("ranges", f"spans for {name!r}, which {mask!r} reads", f"{sorted(ranges)}")
        return {name: check_pairs(f"ranges[{name!r}]", own) for name, own in ranges.items() if name in mask.names}
    if ranges is None:
        return {}
    if len(mask.names) > 1:
        raise InputError("ranges", f"a dictionary with spans for {sorted(mask.names)}", type(ranges).__name__)
    return {name: check_pairs("ranges", ranges) for name in mask.names}


def _uncut(mask: Mask, name: str, spans: SequenceSpans) -> SequenceSpans:
    """The stretches of positions that a chunk holds whole or not at all."""
    whole = mask.whole(name)
    if whole == "nothing" or not spans:
        return ()
    if whole == "span":
        return spans
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    return ((0 if whole == "all" else first, last),)
