"""What a scheduler needs for chunked prefill: a span is prefilled whole, because its first token sees its last one."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from fa4_prefixlm.errors import InputError


def safe_chunk_end(position: int, spans: Iterable[tuple[int, int]]) -> int:
    """The last position at or before `position` where a chunk may end without cutting a span.

    That is `position` itself, or the start of the span that it would cut. If the chunk begins right there, no shorter
    chunk is possible: it has to go on to the span's end at least.

        end = safe_chunk_end(begin + budget, spans)
        if end <= begin:  # a span longer than the budget begins here
            end = next(stop for start, stop in spans if start <= begin < stop)

    Args:
        position: where the scheduler would end the chunk, in tokens from the start of the sequence.
        spans: half-open `(start, end)` spans of the whole sequence, in any order, without overlaps.
    """
    try:
        position = operator.index(position)
    except TypeError:
        raise InputError("position", "an integer", position) from None
    if position < 0:
        raise InputError("position", "at least 0", position)
    cut = position
    for start, end in spans:
        if not 0 <= start < end:
            raise InputError("spans", "pairs with 0 <= start < end", (start, end))
        if start < position < end:
            cut = min(cut, start)
    return cut
