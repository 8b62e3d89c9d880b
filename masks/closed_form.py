"""The closed form of a mask that reads at most one span set and at most one window on each side.

Every row then sees one interval around its own position `p`, whose edges are picked from a short list. With a window of
`w` tokens on the left and `r` on the right, `left = max(0, p - w + 1)`, `right = min(p + 1 + r, end of the keys)`, and
the span `[s, e)` that holds `p`:

| rows | begin at | end at |
| --- | --- | --- |
| outside of spans | 0, `left` | `p + 1`, `right`, the end of the keys |
| inside a span | 0, `left`, `min(left, s)` | those, `e`, `min(right, e)`, `max(right, e)` |

`|` takes the earlier begin and the later end, `&` the later begin and the earlier end. Outside of spans, `same_span`
and `query_in` show a row nothing, which adds nothing to `|` and makes `&` empty. No atom shows a row less inside a span
than outside, and neither do combinations by `|` and `&`, so no row begins after `left`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

Begin = Literal["keys", "window", "window or span"]
End = Literal["row", "window and span", "window", "span", "window or span", "keys"]


@dataclass(frozen=True)
class Edges:
    """The interval of a row.

    Attributes:
        begin: "keys" is 0, "window" is `left`, "window or span" is `min(left, s)`.
        end: "row" is `p + 1`, "window" is `right`, "span" is `e`, "keys" is the end of the sequence's keys, "window and
            span" is `min(right, e)`, "window or span" is `max(right, e)`.
    """

    begin: Begin
    end: End


@dataclass(frozen=True)
class ClosedForm:
    """A mask in closed form.

    `PrefixLM(window=4)` is `ClosedForm("image", 4, Edges("window", "row"), Edges("window", "span"))`.

    Attributes:
        span: name of the span set that the mask reads; None: it reads none, and `inside` is `outside`.
        window: its window on the left in tokens, the row's own included; None: it has none.
        outside: the edges of rows outside of spans.
        inside: those of rows in a span.
        right: its window on the right in tokens, those past the row's own; None: it has none.
    """

    span: str | None
    window: int | None
    outside: Edges
    inside: Edges
    right: int | None = None

    @property
    def is_causal_outside(self) -> bool:
        """Rows outside of spans see no key past their own."""
        return self.outside.end == "row"

    def interval(self, position: int, seqlen_k: int, span: tuple[int, int] | None) -> tuple[int, int]:
        """`[lo, hi)` of the row at `position`, on the host. span: the one that holds the position; None: none does."""
        edges = self.outside if span is None else self.inside
        start, end = span or (0, 0)
        left = 0 if self.window is None else max(0, position - self.window + 1)
        right = seqlen_k if self.right is None else min(position + 1 + self.right, seqlen_k)
        lo = {"keys": 0, "window": left, "window or span": min(left, start)}[edges.begin]
        ends: dict[End, int] = {
            "row": position + 1,
            "window and span": min(right, end),
            "window": right,
            "span": end,
            "window or span": max(right, end),
            "keys": seqlen_k,
        }
        return lo, ends[edges.end]


# In order from the left. A form begins at `left` or before: where `s` is later than that, `left` takes its place.
_BEGINS: tuple[Begin, ...] = ("keys", "window or span", "window")
# The place of each end from the left where the window ends before the span, and where it ends after it.
_ENDS: dict[End, tuple[int, int]] = {
    "row": (0, 0),
    "window and span": (1, 1),
    "window": (1, 2),
    "span": (2, 1),
    "window or span": (2, 2),
    "keys": (3, 3),
}
_END_AT: dict[tuple[int, ...], End] = {places: end for end, places in _ENDS.items()}


@dataclass(frozen=True)
class RowEdges:
    """What a part of a mask shows its rows, and what it reads for that.

    Attributes:
        outside: the interval of rows outside of spans; None: they see nothing.
        inside: that of rows in a span.
        spans: names of the span sets.
        windows: windows on the left in tokens.
        rights: windows on the right in tokens.
    """

    outside: Edges | None
    inside: Edges
    spans: frozenset[str] = frozenset()
    windows: frozenset[int] = frozenset()
    rights: frozenset[int] = frozenset()

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
        windows, rights = self.windows | other.windows, self.rights | other.rights
        return RowEdges(outside, inside, self.spans | other.spans, windows, rights)


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
    if found is None or found.outside is None:
        return None
    if any(len(own) > 1 for own in (found.windows, found.rights, found.spans)):
        return None
    window, right = next(iter(found.windows), None), next(iter(found.rights), None)
    return ClosedForm(next(iter(found.spans), None), window, found.outside, found.inside, right)


def _joined(a: Edges, b: Edges) -> Edges:
    return Edges(min(a.begin, b.begin, key=_BEGINS.index), _end(max, a, b))


def _met(a: Edges, b: Edges) -> Edges:
    return Edges(max(a.begin, b.begin, key=_BEGINS.index), _end(min, a, b))


def _end(pick: Callable[[int, int], int], a: Edges, b: Edges) -> End:
    return _END_AT[tuple(map(pick, _ENDS[a.end], _ENDS[b.end]))]
