"""A mask as one launch takes it: what either of two terms shows a row, or one.

A term is what leaves have in common: keys so far before and after the row's position, of its own id, real ones.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

from fa4_prefixlm.integrations.transformers.mask_functions import (
    AllOf,
    AnyOf,
    Blocks,
    Causal,
    Documents,
    Everything,
    Expression,
    Unpadded,
    Window,
    WindowBothWays,
)
from fa4_prefixlm.integrations.transformers.row_bounds import NotIntervals

MOST = 2
# Further than any key; and it can be added to a position in int32.
FAR = 2**30


class Term(NamedTuple):
    """A row at position `p` sees the keys `[p - left, p + 1 + right)` that have its own id and are real.

    Attributes:
        left, right: see above.
        own: the ids; None: any key.
        unpadded: the real ones; None: any key.
    """

    left: int = FAR
    right: int = FAR
    own: Blocks | Documents | None = None
    unpadded: Unpadded | None = None


def terms_of(expression: Expression) -> list[Term]:
    """What it is: every key that some term shows.

    Raises:
        NotIntervals: it is no such thing, or of more than `MOST`.
    """
    match expression:
        case Causal():
            terms = [Term(right=0)]
        case Everything():
            terms = [Term()]
        case Window(size):
            terms = [Term(left=size - 1)]
        case WindowBothWays(size):
            terms = [Term(left=size, right=size)]
        case Blocks() | Documents():
            terms = [Term(own=expression)]
        case Unpadded():
            terms = [Term(unpadded=expression)]
        case AnyOf(parts):
            terms = [term for part in parts for term in terms_of(part)]
        case AllOf(parts):
            terms = [functools.reduce(_both, met, Term()) for met in itertools.product(*map(terms_of, parts))]
        case _:
            terms = []
    if not 1 <= len(terms) <= MOST:
        raise NotIntervals(expression)
    return terms


def ids_of(terms: list[Term]) -> Blocks | Documents | None:
    """The ids of all terms that have any. Raises `NotIntervals` where those are not the same."""
    return functools.reduce(_same_ids, (term.own for term in terms))


def real_of(terms: list[Term]) -> torch.Tensor | None:
    """The real keys of all terms that say so. Raises `NotIntervals` where those are not the same."""
    one = functools.reduce(_same_keys, (term.unpadded for term in terms))
    return None if one is None else one.real


def _both(one: Term, other: Term) -> Term:
    """What both show."""
    own, unpadded = _same_ids(one.own, other.own), _same_keys(one.unpadded, other.unpadded)
    return Term(min(one.left, other.left), min(one.right, other.right), own, unpadded)


def _same_ids(one: Blocks | Documents | None, other: Blocks | Documents | None) -> Blocks | Documents | None:
    if one is not None and other is not None and (type(one), id(one.ids)) != (type(other), id(other.ids)):
        raise NotIntervals("two kinds of ids")
    return other if one is None else one


def _same_keys(one: Unpadded | None, other: Unpadded | None) -> Unpadded | None:
    if one is not None and other is not None and one.real is not other.real:
        raise NotIntervals("two paddings")
    return other if one is None else one
