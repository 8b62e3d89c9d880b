"""The closed form of a mask that reads at most one span set and at most one window.

Every row then sees one interval around its own position `p`, whose edges are picked from a short list. With the window
`w`, `left = max(0, p - w + 1)`, and the span `[s, e)` that holds `p`:

| rows | begin at | end at |
| --- | --- | --- |
| outside of spans | 0, `left` | `p + 1`, the end of the keys |
| inside a span | 0, `left`, `min(left, s)` | `p + 1`, `e`, the end of the keys |

`|` takes the earlier begin and the later end, `&` the later begin and the earlier end. What `same_span` and `query_in`
show a row outside of spans is empty: it adds nothing to `|` and leaves nothing of `&`. No atom shows a row less inside
a span than outside, nor do `|` and `&` of them, so no row begins after `left`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .algebra import And, Causal, Or, QueryIn, SameSpan, Window
from .mask import Mask

Begin = Literal["keys", "window", "window or span"]
End = Literal["row", "span", "keys"]


@dataclass(frozen=True)
class Edges:
    """The interval of a row.

    begin: "keys" is 0, "window" is `left`, "window or span" is `min(left, s)`.
    end: "row" is `p + 1`, "span" is `e`, "keys" is the end of the sequence's keys.
    """

    begin: Begin
    end: End


@dataclass(frozen=True)
class SpanForm:
    """A mask in closed form.

    span: name of the span set that the mask reads; None: it reads none, and `inside` is `outside`.
    window: its window in tokens; None: it has none.
    outside, inside: the edges of rows outside of spans, and of rows in one.

    Example, `PrefixLM(window=4)`: `SpanForm("image", 4, Edges("window", "row"), Edges("window", "span"))`.
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
        """`[lo, hi)` of the row at `position`, in plain numbers. span: the one that holds it, None if none does."""
        edges = self.outside if span is None else self.inside
        start, end = span or (0, 0)
        left = 0 if self.window is None else max(0, position - self.window + 1)
        lo = {"keys": 0, "window": left, "window or span": min(left, start)}[edges.begin]
        hi = {"row": position + 1, "span": end, "keys": seqlen_k}[edges.end]
        return lo, hi


def span_form(mask: Mask) -> SpanForm | None:
    """The closed form of the mask; None if it has none, or if a row outside of spans would see nothing."""
    found = _seen(mask)
    if found is None or found.outside is None or len(found.windows) > 1 or len(found.spans) > 1:
        return None
    window, span = next(iter(found.windows), None), next(iter(found.spans), None)
    return SpanForm(span, window, found.outside, found.inside)


# From the left. A form begins at `left` or before, so where `s` is later than that, `left` stands for it.
_BEGINS: tuple[Begin, ...] = ("keys", "window or span", "window")
_ENDS: tuple[End, ...] = ("row", "span", "keys")


@dataclass(frozen=True)
class _Seen:
    """What a part of the mask shows rows outside of spans (None: nothing) and inside, and what it reads for that."""

    outside: Edges | None
    inside: Edges
    spans: frozenset[str] = frozenset()
    windows: frozenset[int] = frozenset()


def _seen(mask: Mask) -> _Seen | None:
    from .masks.prefix_lm import PrefixLM  # the masks are made of what is below this module

    kind = type(mask)  # exactly: a subclass may see something else
    if kind is PrefixLM:
        return _seen(mask.expression)  # type: ignore[attr-defined]
    if kind is Causal:
        return _Seen(Edges("keys", "row"), Edges("keys", "row"))
    if kind is Window and isinstance(mask, Window):
        return _Seen(Edges("window", "keys"), Edges("window", "keys"), windows=frozenset({mask.tokens}))
    if kind is SameSpan:
        return _Seen(None, Edges("window or span", "span"), spans=mask.names)
    if kind is QueryIn:
        return _Seen(None, Edges("keys", "keys"), spans=mask.names)
    if kind in (And, Or) and isinstance(mask, And | Or):
        left, right = _seen(mask.left), _seen(mask.right)
        return None if left is None or right is None else _combined(left, right, either=kind is Or)
    return None


def _combined(left: _Seen, right: _Seen, *, either: bool) -> _Seen:
    combine = _joined if either else _met
    if left.outside is None or right.outside is None:
        outside = (left.outside or right.outside) if either else None
    else:
        outside = combine(left.outside, right.outside)
    inside = combine(left.inside, right.inside)
    return _Seen(outside, inside, left.spans | right.spans, left.windows | right.windows)


def _joined(a: Edges, b: Edges) -> Edges:
    return Edges(min(a.begin, b.begin, key=_BEGINS.index), max(a.end, b.end, key=_ENDS.index))


def _met(a: Edges, b: Edges) -> Edges:
    return Edges(max(a.begin, b.begin, key=_BEGINS.index), min(a.end, b.end, key=_ENDS.index))
