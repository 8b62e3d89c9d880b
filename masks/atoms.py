"""The atoms that masks are written with.

For the row at position `p`, windows of `w` and `r` tokens, and the span `[s, e)` that holds `p`:

| atom | keys it sees |
| --- | --- |
| `causal` | `[0, p + 1)` |
| `window(w)` | `[p - w + 1, ...)`: it limits the left side only, and counts the row's own key |
| `window(w, r)` | `[p - w + 1, p + 1 + r)` |
| `everything` | all keys |
| `same_span(name)` | `[s, e)`; nothing outside of spans |
| `same_span(name, before=t)` | `[s - t, e)`; nothing outside of spans |
| `prefix(name)` | `[0, e')`, `e'` the end of the last span that starts at or before `p` |
| `key_in(name)` | all spans of the sequence |
| `key_outside(name)` | all keys but those |
| `query_in(name)` | everything if `p` is in a span, else nothing |
| `one_block(name)` | `query_in(name) & key_in(name)`: all spans of the sequence are one block |
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.closed_form import Edges, End, RowEdges
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO, END_OF_KEYS, Intervals, normalised
from fa4_prefixlm.masks.protocols import Ahead, Ends, Pairs, Reach, Rows

INT32_MAX = torch.iinfo(torch.int32).max


class Atom(Mask):
    """A mask that reads at most one span set, `name`."""

    name: str = ""

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.name}) if self.name else frozenset()

    def count(self, spans: Mapping[str, int]) -> int:
        for name in self.names:
            _require(name, spans)
        return 1


def _require(name: str, spans: Mapping[str, int]) -> int:
    if name not in spans:
        raise InputError("spans", f"a number of spans of {name!r}", f"those of {sorted(spans)}")
    return spans[name]


class _Named(Atom):
    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError("name", "the name of a span set, such as 'image'", repr(self.name))

    def __repr__(self) -> str:
        return f"{self._call}({self.name!r})"

    _call = ""


@dataclass(frozen=True, repr=False)
class Causal(Atom):
    around_position = no_empty_rows = True

    def intervals(self, rows: Rows) -> Intervals:
        return _column(torch.zeros_like(rows.position)), _column(rows.position + 1)

    def edges(self) -> RowEdges:
        return RowEdges(Edges("keys", "row"))

    def ahead(self) -> Ahead:
        return Ahead()

    def ends(self) -> Ends:
        return Ends(of_row=frozenset({1}))

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.key <= pairs.query

    def reach(self, longest: Mapping[str, int]) -> Reach:
        return Reach(None, 1)

    def __repr__(self) -> str:
        return "causal"


@dataclass(frozen=True, repr=False)
class Window(Atom):
    """Keys `[p - left + 1, p + 1 + right)`; None is no limit on that side."""

    left: int | None
    right: int | None = None
    around_position = no_empty_rows = True

    def __post_init__(self) -> None:
        if self.left is not None and not _is_count(self.left, least=1):
            raise InputError("window", "a positive number of tokens, a Python int", repr(self.left))
        if self.right is not None and not _is_count(self.right, least=0):
            raise InputError("right", "a number of tokens, at least 0, a Python int", repr(self.right))

    @property
    def uses_position(self) -> bool:  # type: ignore[override]
        return self.left is not None or self.right is not None

    def intervals(self, rows: Rows) -> Intervals:
        # No limit is wider than any sequence, and none overflows.
        lo, hi = torch.zeros_like(rows.position), torch.full_like(rows.position, END_OF_KEYS)
        if self.left is not None:
            lo = (rows.position - min(self.left - 1, INT32_MAX)).clamp(min=0)
        if self.right is not None:
            right = min(self.right, INT32_MAX)
            hi = torch.minimum(rows.position + 1, rows.seqlen_k - right) + right
        return _column(lo), _column(hi)

    def edges(self) -> RowEdges:
        end: End = "keys" if self.right is None else "window" if self.right else "row"
        return RowEdges(
            Edges("keys" if self.left is None else "window", end),
            windows=frozenset() if self.left is None else frozenset({self.left}),
            rights=frozenset({self.right}) if self.right else frozenset(),
        )

    def ahead(self) -> Ahead:
        return Ahead(keys=self.right != 0)

    def ends(self) -> Ends:
        left = frozenset() if self.left is None else frozenset({1 - self.left})
        return Ends(of_row=left if self.right is None else left | {1 + self.right})

    def visible(self, pairs: Pairs) -> torch.Tensor:
        ahead = pairs.key - pairs.query
        near = pairs.key >= 0 if self.left is None else ahead > -min(self.left, INT32_MAX)
        return near if self.right is None else near & (ahead <= min(self.right, INT32_MAX))

    def reach(self, longest: Mapping[str, int]) -> Reach:
        return Reach(
            None if self.left is None else self.left - 1,
            None if self.right is None else self.right + 1,
        )

    def __repr__(self) -> str:
        if self.right is None:
            return "everything" if self.left is None else f"window({self.left})"
        return f"window({self.left}, {self.right})"


def _is_count(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True, repr=False)
class SameSpan(_Named):
    name: str
    before: int = 0
    around_position = True
    _call = "same_span"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_count(self.before, least=0):
            raise InputError("before", "a number of tokens, at least 0, a Python int", repr(self.before))

    def intervals(self, rows: Rows) -> Intervals:
        start, end = rows.span_of(self.name)
        if self.before:
            start = torch.where(end > 0, (start - min(self.before, INT32_MAX)).clamp(min=0), start)
        return _column(start), _column(end)

    def edges(self) -> RowEdges:
        edges = Edges("window or span", "span")
        return RowEdges(None, {self.name: edges}, befores=frozenset({(self.name, self.before)}))

    def ahead(self) -> Ahead:
        return Ahead(spans=self.names)

    def ends(self) -> Ends:
        return Ends(of_span=frozenset({-self.before}))

    def visible(self, pairs: Pairs) -> torch.Tensor:
        same = pairs.same_span(self.name)
        if not self.before:
            return same
        start = pairs.query - pairs.query_offset(self.name)
        near = (pairs.key < start) & (pairs.key >= start - min(self.before, INT32_MAX))
        return same | (near & pairs.query_in(self.name))

    def reach(self, longest: Mapping[str, int]) -> Reach:
        return Reach(longest[self.name] + self.before, longest[self.name])

    def __repr__(self) -> str:
        return f"same_span({self.name!r}, before={self.before})" if self.before else super().__repr__()


@dataclass(frozen=True, repr=False)
class Prefix(_Named):
    name: str
    _call = "prefix"

    def intervals(self, rows: Rows) -> Intervals:
        _, end = rows.latest_span(self.name)
        return _column(torch.where(end > 0, 0, EMPTY_LO).to(torch.int32)), _column(end)

    def ahead(self) -> Ahead:
        return Ahead(spans=self.names)

    def ends(self) -> Ends:
        return Ends()

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.before_end_of_latest(self.name)


@dataclass(frozen=True, repr=False)
class QueryIn(_Named):
    name: str
    around_position = True
    _call = "query_in"

    def intervals(self, rows: Rows) -> Intervals:
        inside = rows.span_of(self.name)[1] > 0
        lo, hi = torch.where(inside, 0, EMPTY_LO), torch.where(inside, END_OF_KEYS, EMPTY_HI)
        return _column(lo.to(torch.int32)), _column(hi.to(torch.int32))

    def edges(self) -> RowEdges:
        return RowEdges(None, {self.name: Edges("keys", "keys")})

    def ahead(self) -> Ahead:
        return Ahead(keys=True)

    def ends(self) -> Ends:
        return Ends()

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.query_in(self.name)


@dataclass(frozen=True, repr=False)
class KeyIn(_Named):
    name: str
    _call = "key_in"

    uses_position = False

    def count(self, spans: Mapping[str, int]) -> int:
        return max(1, _require(self.name, spans))

    def intervals(self, rows: Rows) -> Intervals:
        return normalised(*self.unordered_intervals(rows))

    def unordered_intervals(self, rows: Rows) -> Intervals:
        start, end = rows.spans_of(self.name)
        if start.shape[1] == 0:  # no spans are one empty interval
            start, end = (torch.nn.functional.pad(edge, (0, 1)) for edge in (start, end))
        return start, end

    def ahead(self) -> Ahead:
        return Ahead(everywhere=self.names)

    def ends(self) -> Ends:
        return Ends()

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.key_in(self.name)


@dataclass(frozen=True, repr=False)
class KeyOutside(_Named):
    name: str
    _call = "key_outside"

    uses_position = False

    def count(self, spans: Mapping[str, int]) -> int:
        return 1 + _require(self.name, spans)

    def intervals(self, rows: Rows) -> Intervals:
        # From the end of each span to the start of the next; unused spans stand past all keys.
        start, end = rows.spans_of(self.name)
        lo = torch.nn.functional.pad(torch.where(end > 0, end, EMPTY_LO), (1, 0), value=0)
        hi = torch.nn.functional.pad(start, (0, 1), value=END_OF_KEYS)
        return normalised(lo, hi)

    def ahead(self) -> Ahead:
        return Ahead(keys=True)

    def ends(self) -> Ends:
        return Ends()

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return ~pairs.key_in(self.name)


@dataclass(frozen=True, repr=False)
class OneBlock(_Named):
    name: str
    _call = "one_block"

    @property
    def block_of(self) -> str:  # type: ignore[override]
        return self.name

    def count(self, spans: Mapping[str, int]) -> int:
        return max(1, _require(self.name, spans))

    def intervals(self, rows: Rows) -> Intervals:
        return (QueryIn(self.name) & KeyIn(self.name)).intervals(rows)

    def ahead(self) -> Ahead:
        return Ahead(blocks=self.names)

    def ends(self) -> Ends:
        return Ends()

    def visible(self, pairs: Pairs) -> torch.Tensor:
        return pairs.query_in(self.name) & pairs.key_in(self.name)


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.unsqueeze(1)


causal = Causal()


def window(left: int | None, right: int | None = None) -> Mask:
    """Keys near the query: `query - key < left` and `key - query <= right`.

    The two sides count differently, as models do: `left` counts the query's own key, `right` only those after it.
    `window(w)` limits the left side alone, and is combined with `causal`; `causal & window(w)` is `window(w, 0)`. Both
    ways, `abs(query - key) <= r` is `window(r + 1, r)`.

    Args:
        left: tokens, at least 1; None: no limit on the left.
        right: tokens, at least 0; None: no limit on the right.

    Raises:
        InputError: a side is no such number.
    """
    return Window(_as_int(left), _as_int(right))


def _as_int(tokens: int | None) -> int | None:
    if not isinstance(tokens, bool):
        with contextlib.suppress(TypeError):
            return operator.index(tokens)  # type: ignore[arg-type]  # NumPy's integers are integers
    return tokens


everything = Window(None, None)


def same_span(name: str = "image", *, before: int = 0) -> Mask:
    """Tokens of one span of `name` see each other, in both directions.

    Args:
        name: of the span set.
        before: tokens before the span that all of its tokens see as well.

    Raises:
        InputError: `name` is no string, or empty, or `before` is no number of tokens.
    """
    before_as_int = _as_int(before)
    return SameSpan(name, before if before_as_int is None else before_as_int)


def prefix(name: str = "prompt") -> Mask:
    """Keys before the end of the last span of `name` that starts at or before the query: all of it and what is left of
    it. One span at 0 is a prompt that every later token keeps in sight.

    Args:
        name: of the span set.

    Raises:
        InputError: `name` is no string, or empty.
    """
    return Prefix(name)


def key_in(name: str) -> Mask:
    """Keys in any span of `name`. A row sees as many intervals as the sequence has spans.

    Args:
        name: of the span set.

    Raises:
        InputError: `name` is no string, or empty.
    """
    return KeyIn(name)


def key_outside(name: str) -> Mask:
    """Keys in no span of `name`. A row sees as many intervals as the sequence has spans, and one more.

    Args:
        name: of the span set.

    Raises:
        InputError: `name` is no string, or empty.
    """
    return KeyOutside(name)


def query_in(name: str) -> Mask:
    """Queries in any span of `name` see everything, others nothing. Combine it by `&`.

    Args:
        name: of the span set.

    Raises:
        InputError: `name` is no string, or empty.
    """
    return QueryIn(name)


def one_block(name: str = "image") -> Mask:
    """All spans of `name` in a sequence are one block, whose tokens see each other.

    Written as `mask | one_block(name)` it costs one tag per token, however many spans there are.

    Args:
        name: of the span set.

    Raises:
        InputError: `name` is no string, or empty.
    """
    return OneBlock(name)
