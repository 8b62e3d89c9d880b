"""The closed form of a mask that reads at most two span sets and at most one window on each side.

Every row then sees one interval around its own position `p`, whose edges are picked from a short list. With a window of
`w` tokens on the left and `r` on the right, `left = max(0, p - w + 1)`, `right = min(p + 1 + r, end of the keys)`, and
the span `[s, e)` of a set that holds `p` (for `same_span(name, before=t)`, `s` is `t` tokens earlier):

| rows | begin at | end at |
| --- | --- | --- |
| outside of spans | 0, `left` | `p + 1`, `right`, the end of the keys |
| inside a span | 0, `left`, `min(left, s)` | those, `e`, `min(right, e)`, `max(right, e)` |

`|` takes the earlier begin and the later end, `&` the later begin and the earlier end. Outside of spans, `same_span`
and `query_in` show a row nothing, which adds nothing to `|` and makes `&` empty. No atom shows a row less inside a span
than outside, and neither do combinations by `|` and `&`, so no row begins after `left`.

A row in spans of both sets sees the union of what it sees in each. That is so of masks that join the sets by `|`; where
they meet by `&` there is no closed form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
class Inside:
    """What rows in a span of one set see.

    Attributes:
        span: name of the set.
        edges: of the interval.
        before: tokens by which the begin of the span, `s`, is moved to the left.
    """

    span: str
    edges: Edges
    before: int = 0


# Span sets of a closed form. Kernels that fill rows look in so many.
MOST_SETS = 2


@dataclass(frozen=True)
class ClosedForm:
    """A mask in closed form.

    `PrefixLM(window=4)` is `ClosedForm(Edges("window", "row"), (Inside("image", Edges("window", "span")),), window=4)`.

    Attributes:
        outside: the edges of rows outside of spans.
        inside: those of rows in a span, one for each set that the mask reads, by name.
        window: its window on the left in tokens, the row's own included; None: it has none.
        right: its window on the right in tokens, those past the row's own; None: it has none.
    """

    outside: Edges
    inside: tuple[Inside, ...] = ()
    window: int | None = None
    right: int | None = None

    @property
    def is_causal_outside(self) -> bool:
        """Rows outside of spans see no key past their own."""
        return self.outside.end == "row"

    @property
    def telling(self) -> tuple[Inside, ...]:
        """The sets in whose spans rows see more than outside."""
        return tuple(own for own in self.inside if own.edges != self.outside)

    def interval(self, position: int, seqlen_k: int, spans: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        """`[lo, hi)` of the row at `position`, on the host. spans: those that hold the position, by name."""
        seen = [self._interval(self.outside, position, seqlen_k, (0, 0))]
        for own in self.inside:
            if own.span in spans:
                start, end = spans[own.span]
                seen.append(self._interval(own.edges, position, seqlen_k, (max(0, start - own.before), end)))
        return min(lo for lo, _ in seen), max(hi for _, hi in seen)

    def _interval(self, edges: Edges, position: int, seqlen_k: int, span: tuple[int, int]) -> tuple[int, int]:
        start, end = span
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
        inside: that of rows in a span, by set.
        windows: windows on the left in tokens.
        rights: windows on the right in tokens.
        befores: by how many tokens the begin of a set's spans is moved to the left, as `(name, tokens)`.
    """

    outside: Edges | None
    inside: Mapping[str, Edges] = field(default_factory=dict)
    windows: frozenset[int] = frozenset()
    rights: frozenset[int] = frozenset()
    befores: frozenset[tuple[str, int]] = frozenset()

    def joined(self, other: RowEdges) -> RowEdges:
        """The edges of `self | other`."""
        return self._with(other, _joined)

    def met(self, other: RowEdges) -> RowEdges | None:
        """The edges of `self & other`; None where two sets meet."""
        if self.inside and other.inside and len({*self.inside, *other.inside}) > 1:
            return None
        return self._with(other, _met)

    def _with(self, other: RowEdges, combine: Callable[[Edges | None, Edges | None], Edges | None]) -> RowEdges:
        inside = {}
        for name in {*self.inside, *other.inside}:
            edges = combine(self.inside.get(name, self.outside), other.inside.get(name, other.outside))
            assert edges is not None  # a mask without spans shows every row something
            inside[name] = edges
        return RowEdges(
            combine(self.outside, other.outside),
            inside,
            self.windows | other.windows,
            self.rights | other.rights,
            self.befores | other.befores,
        )


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
    if found is None or found.outside is None or len(found.inside) > MOST_SETS:
        return None
    if len(found.windows) > 1 or len(found.rights) > 1:
        return None
    befores = dict(found.befores)
    if len(befores) < len(found.befores):  # one set, moved in two ways
        return None
    inside = [Inside(name, found.inside[name], befores.get(name, 0)) for name in sorted(found.inside)]
    return ClosedForm(found.outside, tuple(inside), next(iter(found.windows), None), next(iter(found.rights), None))


def _joined(a: Edges | None, b: Edges | None) -> Edges | None:
    if a is None or b is None:
        return a or b
    return Edges(min(a.begin, b.begin, key=_BEGINS.index), _end(max, a, b))


def _met(a: Edges | None, b: Edges | None) -> Edges | None:
    if a is None or b is None:
        return None
    return Edges(max(a.begin, b.begin, key=_BEGINS.index), _end(min, a, b))


def _end(pick: Callable[[int, int], int], a: Edges, b: Edges) -> End:
    return _END_AT[tuple(map(pick, _ENDS[a.end], _ENDS[b.end]))]
