"""The closed form of a mask that reads at most one span set and at most one window.

Every row then sees one interval around its own position `p`, whose edges are picked from a short list. With the window
`w`, `left = max(0, p - w + 1)`, and the span `[s, e)` that holds `p`:

| rows | begin at | end at |
| --- | --- | --- |
| outside of spans | 0, `left` | `p + 1`, the end of the keys |
| inside a span | 0, `left`, `min(left, s)` | `p + 1`, `e`, the end of the keys |

`|` takes the earlier begin and the later end, `&` the later begin and the earlier end. Outside of spans, `same_span`
and `query_in` show a row nothing, which adds nothing to `|` and makes `&` empty. No atom shows a row less inside a span
than outside, and neither do combinations by `|` and `&`, so no row begins after `left`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, Protocol

Begin = Literal["keys", "window", "window or span"]
End = Literal["row", "span", "keys"]


@dataclass(frozen=True)
class Edges:
    """The interval of a row.

    Attributes:
        begin: "keys" is 0, "window" is `left`, "window or span" is `min(left, s)`.
        end: "row" is `p + 1`, "span" is `e`, "keys" is the end of the sequence's keys.
    """

    begin: Begin
    end: End


@dataclass(frozen=True)
class ClosedForm:
    """A mask in closed form.

    `PrefixLM(window=4)` is `ClosedForm("image", 4, Edges("window", "row"), Edges("window", "span"))`.

    Attributes:
        span: name of the span set that the mask reads; None: it reads none, and `inside` is `outside`.
        window: its window in tokens; None: it has none.
        outside: the edges of rows outside of spans.
        inside: those of rows in a span.
    """

    span: str | None
    window: int | None
    outside: Edges
    inside: Edges

    @property
    def is_causal_outside(self) -> bool:
        """Rows outside of spans see no key past their own."""
        return self.outside.end == "row"

    def interval(self, position: int, seqlen_k: int, span: tuple[int, int] | None) -> tuple[int, int]:
        """`[lo, hi)` of the row at `position`, on the host. span: the one that holds the position; None: none does."""
        edges = self.outside if span is None else self.inside
        start, end = span or (0, 0)
        left = 0 if self.window is None else max(0, position - self.window + 1)
        lo = {"keys": 0, "window": left, "window or span": min(left, start)}[edges.begin]
        hi = {"row": position + 1, "span": end, "keys": seqlen_k}[edges.end]
        return lo, hi


# In order from the left. A form begins at `left` or before: where `s` is later than that, `left` takes its place.
_BEGINS: tuple[Begin, ...] = ("keys", "window or span", "window")
_ENDS: tuple[End, ...] = ("row", "span", "keys")


@dataclass(frozen=True)
class RowEdges:
    """What a part of a mask shows its rows, and what it reads for that.

    Attributes:
        outside: the interval of rows outside of spans; None: they see nothing.
        inside: that of rows in a span.
        spans: names of the span sets.
        windows: windows in tokens.
    """

    outside: Edges | None
    inside: Edges
    spans: frozenset[str] = frozenset()
    windows: frozenset[int] = frozenset()

    def joined(self, other: RowEdges) -> RowEdges:
        """The edges of `self | other`."""
        outside = self.outside or other.outside
        if self.outside is not None and other.outside is not None:
            outside = _joined(self.outside, other.outside)
        return self._with(other, outside, _joined(self.inside, other.inside))

    def met(self, other: RowEdges) -> RowEdges:
        """The edges of `self & other`."""
        outside = None
        if self.outside is not None and other.outside is not None:
            outside = _met(self.outside, other.outside)
        return self._with(other, outside, _met(self.inside, other.inside))

    def _with(self, other: RowEdges, outside: Edges | None, inside: Edges) -> RowEdges:
        return RowEdges(outside, inside, self.spans | other.spans, self.windows | other.windows)


class HasEdges(Protocol):
    """The part of a mask that its closed form is read from."""

    def edges(self) -> RowEdges | None:
        """What its rows see; None if they have no closed form."""


def edges_of(mask: HasEdges) -> RowEdges | None:
    """What the mask's rows see; None if that is not known.

    A subclass that overrides what its rows see (`intervals`, `visible`) but not `edges` does not inherit the edges.
    """
    return mask.edges() if speaks_for_itself(mask, "edges") else None


def speaks_for_itself(mask: object, method: str) -> bool:
    """The method comes from the class that says what rows see (`intervals`, `visible`), or from a subclass of it."""
    return _said_as_deep(type(mask), method)  # type: ignore[arg-type]


@functools.cache
def _said_as_deep(kind: type, method: str) -> bool:
    order = kind.__mro__
    own, *others = (next(at for at, base in enumerate(order) if name in vars(base)) for name in (method, *_ROW_METHODS))
    return own <= min(others)


_ROW_METHODS = ("intervals", "visible")


def closed_form(mask: HasEdges) -> ClosedForm | None:
    """The closed form of the mask; None if it has none, or if a row outside of spans would see nothing."""
    found = edges_of(mask)
    if found is None or found.outside is None or len(found.windows) > 1 or len(found.spans) > 1:
        return None
    window, span = next(iter(found.windows), None), next(iter(found.spans), None)
    return ClosedForm(span, window, found.outside, found.inside)


def _joined(a: Edges, b: Edges) -> Edges:
    return Edges(min(a.begin, b.begin, key=_BEGINS.index), max(a.end, b.end, key=_ENDS.index))


def _met(a: Edges, b: Edges) -> Edges:
    return Edges(max(a.begin, b.begin, key=_BEGINS.index), min(a.end, b.end, key=_ENDS.index))
