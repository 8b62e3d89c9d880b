"""The atoms that masks are written with, and `&` and `|` of them: interval algebra per query row.

For the row at position `p`, window `w`, and the span `[s, e)` that holds `p`:

| atom | keys it sees |
| --- | --- |
| `causal` | `[0, p + 1)` |
| `window(w)` | `[p - w + 1, ...)`: it looks left only, and counts the row's own key |
| `same_span(name)` | `[s, e)`; nothing outside of spans |
| `prefix(name)` | `[0, e')`, `e'` the end of the last span that starts at or before `p` |
| `key_in(name)` | all spans of the sequence |
| `query_in(name)` | everything if `p` is in a span, else nothing |
| `one_block(name)` | `query_in(name) & key_in(name)`: all spans of the sequence are one block |
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .errors import InputError
from .mask import EMPTY_HI, EMPTY_LO, END_OF_KEYS, Intervals, Mask, Pairs, Reach, Rows

INT32_MAX = torch.iinfo(torch.int32).max


class Atom(Mask):
    """A mask that reads at most one span set, `name`."""

    name: str = ""

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.name}) if self.name else frozenset()

    def count(self, spans: Mapping[str, int]) -> int:
        return 1


class _Named(Atom):
    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError("name", "the name of a span set, such as 'image'", repr(self.name))

    def __repr__(self) -> str:
        return f"{self._call}({self.name!r})"

    _call = ""


@dataclass(frozen=True, repr=False)
class Causal(Atom):
    centered = total = True

    def intervals(self, rows: Rows) -> Intervals:
        return _column(torch.zeros_like(rows.position)), _column(rows.position + 1)

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.key <= pairs.query

    def reach(self, longest: Mapping[str, int]) -> Reach:
        return Reach(None, 1)

    def __repr__(self) -> str:
        return "causal"


@dataclass(frozen=True, repr=False)
class Window(Atom):
    tokens: int
    centered = total = True

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 1:
            raise InputError("window", "a positive number of tokens, a Python int", repr(self.tokens))

    def intervals(self, rows: Rows) -> Intervals:
        lo = rows.position - min(self.tokens - 1, INT32_MAX)  # no wider than any sequence, and no overflow
        return _column(lo.clamp(min=0)), _column(torch.full_like(lo, END_OF_KEYS))

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.query - pairs.key < self.tokens

    def reach(self, longest: Mapping[str, int]) -> Reach:
        return Reach(self.tokens - 1, None)

    def __repr__(self) -> str:
        return f"window({self.tokens})"


@dataclass(frozen=True, repr=False)
class SameSpan(_Named):
    name: str
    centered = True
    _call = "same_span"

    def intervals(self, rows: Rows) -> Intervals:
        start, end = rows.span_of(self.name)
        return _column(start), _column(end)

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.same_span(self.name)

    def reach(self, longest: Mapping[str, int]) -> Reach:
        return Reach(longest[self.name], longest[self.name])


@dataclass(frozen=True, repr=False)
class Prefix(_Named):
    name: str
    _call = "prefix"

    def intervals(self, rows: Rows) -> Intervals:
        _, end = rows.latest_span(self.name)
        return _column(torch.where(end > 0, 0, EMPTY_LO).to(torch.int32)), _column(end)

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.before_end_of_latest(self.name)


@dataclass(frozen=True, repr=False)
class QueryIn(_Named):
    name: str
    centered = True
    _call = "query_in"

    def intervals(self, rows: Rows) -> Intervals:
        inside = rows.span_of(self.name)[1] > 0
        lo, hi = torch.where(inside, 0, EMPTY_LO), torch.where(inside, END_OF_KEYS, EMPTY_HI)
        return _column(lo.to(torch.int32)), _column(hi.to(torch.int32))

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.query_in(self.name)


@dataclass(frozen=True, repr=False)
class KeyIn(_Named):
    name: str
    _call = "key_in"

    def count(self, spans: Mapping[str, int]) -> int:
        return max(1, spans[self.name])

    def intervals(self, rows: Rows) -> Intervals:
        return normalised(*rows.spans_of(self.name))

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.key_in(self.name)


@dataclass(frozen=True, repr=False)
class OneBlock(_Named):
    name: str
    _call = "one_block"

    def count(self, spans: Mapping[str, int]) -> int:
        return max(1, spans[self.name])

    def intervals(self, rows: Rows) -> Intervals:
        return (QueryIn(self.name) & KeyIn(self.name)).intervals(rows)

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.query_in(self.name) & pairs.key_in(self.name)


@dataclass(frozen=True, repr=False)
class _Two(Mask):
    """Two masks, combined."""

    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        for part in (self.left, self.right):
            if part.custom_kernel is not None:
                expected = "masks without a kernel of their own (from_cute): the kernel has to say the whole mask"
                raise InputError("mask", expected, repr(part))

    @property
    def evaluated(self) -> bool:  # type: ignore[override]
        return self.left.evaluated or self.right.evaluated

    @property
    def names(self) -> frozenset[str]:
        return self.left.names | self.right.names

    @property
    def centered(self) -> bool:  # type: ignore[override]
        # Intervals that hold the row's own position meet in one, and join to one.
        return self.left.centered and self.right.centered


class And(_Two):
    @property
    def total(self) -> bool:  # type: ignore[override]
        return self.centered and self.left.total and self.right.total

    def count(self, spans: Mapping[str, int]) -> int:
        return self.left.count(spans) + self.right.count(spans) - 1

    def intervals(self, rows: Rows) -> Intervals:
        lo_a, hi_a = self.left.intervals(rows)
        lo_b, hi_b = self.right.intervals(rows)
        lo = torch.maximum(lo_a.unsqueeze(2), lo_b.unsqueeze(1)).flatten(1)
        hi = torch.minimum(hi_a.unsqueeze(2), hi_b.unsqueeze(1)).flatten(1)
        # Two disjoint lists of k and l intervals meet in at most k + l - 1.
        most = lo_a.shape[1] + lo_b.shape[1] - 1
        lo, hi = emptied(lo, hi) if lo.shape[1] == 1 else normalised(lo, hi)
        return lo.narrow(1, 0, most), hi.narrow(1, 0, most)

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return self.left.visible(pairs) & self.right.visible(pairs)

    def reach(self, longest: Mapping[str, int]) -> Reach:
        a, b = self.left.reach(longest), self.right.reach(longest)
        return Reach(_least(a.left, b.left), _least(a.right, b.right))

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in (self.left, self.right))


class Or(_Two):
    @property
    def total(self) -> bool:  # type: ignore[override]
        return self.left.total or self.right.total

    def count(self, spans: Mapping[str, int]) -> int:
        return 1 if self.centered else self.left.count(spans) + self.right.count(spans)

    def intervals(self, rows: Rows) -> Intervals:
        lo_a, hi_a = self.left.intervals(rows)
        lo_b, hi_b = self.right.intervals(rows)
        if self.centered:  # both hold the row's own position, or are empty, which min and max pass over
            return torch.minimum(lo_a, lo_b), torch.maximum(hi_a, hi_b)
        return normalised(torch.cat([lo_a, lo_b], dim=1), torch.cat([hi_a, hi_b], dim=1))

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return self.left.visible(pairs) | self.right.visible(pairs)

    def reach(self, longest: Mapping[str, int]) -> Reach:
        a, b = self.left.reach(longest), self.right.reach(longest)
        left = None if a.left is None or b.left is None else max(a.left, b.left)
        right = None if a.right is None or b.right is None else max(a.right, b.right)
        return Reach(left, right)

    def block_name(self) -> str | None:
        for part in (self.right, self.left):
            if isinstance(part, OneBlock):
                return part.name
        return None

    def without_block(self) -> Mask:
        if isinstance(self.right, OneBlock):
            return self.left
        return self.right if isinstance(self.left, OneBlock) else self

    def __repr__(self) -> str:
        return f"{self.left!r} | {self.right!r}"


def both(left: Mask, right: Mask) -> Mask:
    return And(left, right)


def either(left: Mask, right: Mask) -> Mask:
    return Or(left, right)


def emptied(lo: torch.Tensor, hi: torch.Tensor) -> Intervals:
    """Empty intervals in their one form, `(EMPTY_LO, EMPTY_HI)`."""
    empty = lo >= hi
    return lo.masked_fill(empty, EMPTY_LO), hi.masked_fill(empty, EMPTY_HI)


def normalised(lo: torch.Tensor, hi: torch.Tensor) -> Intervals:
    """The union of a row's intervals `(total_q, K)` as disjoint ascending ones that do not touch; empty ones last."""
    lo, hi = emptied(lo, hi)
    if lo.shape[1] <= 1:
        return lo, hi
    lo, order = lo.sort(dim=1)
    hi = hi.gather(1, order)
    furthest = hi.cummax(dim=1).values
    before = torch.cat([torch.full_like(furthest.narrow(1, 0, 1), -1), furthest.narrow(1, 0, lo.shape[1] - 1)], dim=1)
    group = (lo > before).cumsum(1) - 1
    merged_lo = torch.full_like(lo, EMPTY_LO).scatter_reduce(1, group, lo, "amin")
    merged_hi = torch.full_like(hi, EMPTY_HI).scatter_reduce(1, group, hi, "amax")
    return merged_lo, merged_hi


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.unsqueeze(1)


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


causal = Causal()


def window(tokens: int) -> Mask:
    """Keys less than `tokens` before the query: `query - key < tokens`. It looks left only, so combine it."""
    if not isinstance(tokens, bool):
        with contextlib.suppress(TypeError):
            tokens = operator.index(tokens)  # NumPy's integers are integers
    return Window(tokens)


def same_span(name: str = "image") -> Mask:
    """Tokens of one span of `name` see each other, in both directions."""
    return SameSpan(name)


def prefix(name: str = "prompt") -> Mask:
    """Keys before the end of the last span of `name` that starts at or before the query: all of it and what is left of
    it. One span at 0 is a prompt that every later token keeps in sight.
    """
    return Prefix(name)


def key_in(name: str) -> Mask:
    """Keys in any span of `name`. A row sees as many intervals as the sequence has spans."""
    return KeyIn(name)


def query_in(name: str) -> Mask:
    """Queries in any span of `name` see everything, others nothing. Combine it by `&`."""
    return QueryIn(name)


def one_block(name: str = "image") -> Mask:
    """All spans of `name` in a sequence are one block, whose tokens see each other.

    Written as `mask | one_block(name)` it costs one tag per token, however many spans there are.
    """
    return OneBlock(name)
