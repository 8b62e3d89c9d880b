"""A mask put together of the library's own atoms, flattened: what can be told about it as data, without its classes.

`in_plain_parts` spells a mask out. `few_parts` goes on, and says it as an OR of ANDs of `Part`s:
`causal & (window(4) | key_in("image"))` has the parts `causal`, `window(4)` and `key_in("image")`, and the terms
`causal & window(4)` and `causal & key_in("image")`. There is no complement, so no term is needed beside these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, cast

from fa4_prefixlm.batch.ranges import SequenceSpans
from fa4_prefixlm.masks.atoms import Causal, KeyIn, KeyOutside, OneBlock, Prefix, QueryIn, SameSpan, Window
from fa4_prefixlm.masks.base import And, Mask, Or
from fa4_prefixlm.masks.interval_lists import END_OF_KEYS
from fa4_prefixlm.masks.prefix_lm import PrefixLM

# What these say of a row and a key depends on how far tokens are apart and who is in which span, and on nothing else.
PLAIN = frozenset({Causal, Window, SameSpan, Prefix, QueryIn, KeyIn, KeyOutside, OneBlock})
# Of a mask that `few_parts` takes.
MOST_PARTS, MOST_TERMS, MOST_SETS = 16, 16, 4


def in_plain_parts(mask: Mask, other: Callable[[Mask], Mask | None] = lambda part: None) -> Mask | None:
    """The mask as `&` and `|` of plain atoms; None if it has another part, such as a class of somebody else's.

    other: what to put in the place of such a part; None: there is nothing.
    """
    kind = type(mask)  # a subclass may say anything
    if kind in PLAIN:
        return mask
    if kind is And or kind is Or:
        pair = cast(And | Or, mask)
        left, right = in_plain_parts(pair.left, other), in_plain_parts(pair.right, other)
        if left is None or right is None:
            return None
        return mask if left is pair.left and right is pair.right else kind(left, right)
    if kind is PrefixLM:
        return in_plain_parts(cast(PrefixLM, mask).expression, other)
    return other(mask)


class Kind(IntEnum):
    """What a part shows a row: one interval, or all keys in spans, or all others."""

    WINDOW, SPAN, PREFIX, QUERY_IN, KEY_IN, KEY_OUTSIDE = range(6)


Interval = tuple[int, int]


class Part(NamedTuple):
    """An atom as four values.

    Attributes:
        kind: `causal` is `window(None, 0)`.
        name: of the span set that it reads; "": none.
        left: tokens before the row's own that a window holds, or before its span that `same_span` does, at most
            `END_OF_KEYS`, which for a window is no limit.
        right: tokens after the row's own that a window holds, in the same way.
    """

    kind: Kind
    name: str = ""
    left: int = END_OF_KEYS
    right: int = END_OF_KEYS

    @property
    def of_keys(self) -> bool:
        """What it shows is the same for every row."""
        return self.kind in (Kind.KEY_IN, Kind.KEY_OUTSIDE)

    def seen(self, position: int, keys: int, spans: SequenceSpans) -> list[Interval]:
        """What the row at `position` sees of `keys` keys, ascending. spans: of its set, ascending."""
        if self.kind == Kind.WINDOW:
            return [(max(position - self.left, 0), min(position + 1 + self.right, keys))]
        if self.of_keys:
            here = [(start, min(end, keys)) for start, end in spans if start < keys]
            if self.kind == Kind.KEY_IN:
                return here
            return list(zip([0, *(end for _, end in here)], [*(start for start, _ in here), keys], strict=True))
        start, end = max((own for own in spans if own[0] <= position), default=(0, 0))
        if self.kind == Kind.PREFIX:
            return [(0, min(end, keys))]
        if position >= end:
            return []
        return [(max(start - self.left, 0), min(end, keys)) if self.kind == Kind.SPAN else (0, keys)]


@dataclass(frozen=True)
class FewParts:
    """A mask as an OR of ANDs: a row sees a key if all parts of some term show it.

    Attributes:
        parts: what the terms are made of.
        terms: each as ascending indices of parts; none holds all of another.
        names: the span sets that it reads, those of parts `of_keys` first.
        key_sets: how many those are.
    """

    parts: tuple[Part, ...]
    terms: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    key_sets: int

    def seen(self, position: int, keys: int, spans: Mapping[str, SequenceSpans]) -> list[Interval]:
        """What the row at `position` sees of `keys` keys: disjoint, ascending, and none touches the next.

        spans: of its sequence, each set ascending.
        """
        by_part = [own.seen(position, keys, spans[own.name] if own.name else ()) for own in self.parts]
        return _joined([own for term in self.terms for own in functools.reduce(_met, (by_part[at] for at in term))])


def few_parts(mask: Mask) -> FewParts | None:
    """The mask in few parts; None if it has one that is not plain, or would have too many."""
    plain = in_plain_parts(mask)
    return None if plain is None else _few_parts(plain)


@functools.lru_cache(maxsize=256)
def _few_parts(plain: Mask) -> FewParts | None:
    terms = _terms(plain)
    if terms is None:
        return None
    parts = sorted({part for term in terms for part in term})
    names = sorted({own.name for own in parts if own.of_keys})
    key_sets = len(names)
    names += sorted({own.name for own in parts if own.name} - {*names})
    if len(parts) > MOST_PARTS or len(names) > MOST_SETS:
        return None
    indices = sorted(tuple(at for at, own in enumerate(parts) if own in term) for term in terms)
    return FewParts(tuple(parts), tuple(indices), tuple(names), key_sets)


Terms = frozenset[frozenset[Part]]


def _terms(plain: Mask) -> Terms | None:
    if not isinstance(plain, (And, Or)):
        return frozenset({frozenset(_parts(plain))})
    left, right = _terms(plain.left), _terms(plain.right)
    if left is None or right is None:
        return None
    joined = left | right if isinstance(plain, Or) else {one | other for one in left for other in right}
    least = frozenset(own for own in joined if not any(other < own for other in joined))
    return least if len(least) <= MOST_TERMS else None


def _parts(atom: Mask) -> tuple[Part, ...]:
    """An atom as parts that all have to show a key."""

    def clamped(tokens: int | None) -> int:
        return END_OF_KEYS if tokens is None else min(tokens, END_OF_KEYS)

    if isinstance(atom, Causal):
        return (Part(Kind.WINDOW, right=0),)
    if isinstance(atom, Window):
        return (Part(Kind.WINDOW, "", clamped(None if atom.left is None else atom.left - 1), clamped(atom.right)),)
    if isinstance(atom, SameSpan):
        return (Part(Kind.SPAN, atom.name, clamped(atom.before)),)
    if isinstance(atom, OneBlock):
        return (Part(Kind.QUERY_IN, atom.name), Part(Kind.KEY_IN, atom.name))
    kinds = {Prefix: Kind.PREFIX, QueryIn: Kind.QUERY_IN, KeyIn: Kind.KEY_IN, KeyOutside: Kind.KEY_OUTSIDE}
    assert isinstance(atom, (Prefix, QueryIn, KeyIn, KeyOutside)), "the others are above"
    return (Part(kinds[type(atom)], atom.name),)


def _met(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What both hold; each is disjoint and ascending."""
    found, a, b = [], 0, 0
    while a < len(one) and b < len(other):
        lo, hi = max(one[a][0], other[b][0]), min(one[a][1], other[b][1])
        if lo < hi:
            found.append((lo, hi))
        if one[a][1] < other[b][1]:
            a += 1
        else:
            b += 1
    return found


def _joined(intervals: list[Interval]) -> list[Interval]:
    found: list[Interval] = []
    for lo, hi in sorted(intervals):
        if lo >= hi:
            continue
        if found and lo <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], hi)
        else:
            found.append((lo, hi))
    return found
