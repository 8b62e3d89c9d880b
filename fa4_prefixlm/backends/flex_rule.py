"""A mask's own rule in the kernel of `flex`: `Mask.visible`, pair by pair, over a few numbers of each token.

Where a row sees many intervals, comparing a key with each of them costs more than what the mask says in words:
`causal & (window(1024) | key_in("image"))` is three comparisons, however many images there are.

Rows and keys are those of the packed batch. A row's place is where the key of its own position would be among the
packed keys, and spans are moved along, so that within a sequence all is as far apart as it is by position. That the key
is of the row's sequence is not the rule's to say, nor that it is not after the row, where the mask is `causal & ...`:
both are an interval of keys, which a single comparison tells.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fa4_prefixlm.batch.ranges import LARGEST
from fa4_prefixlm.masks.atoms import Causal
from fa4_prefixlm.masks.base import And, Mask, Or
from fa4_prefixlm.masks.noised_copy import BlockDiffusion
from fa4_prefixlm.masks.plain_parts import in_plain_parts

# Up to so many intervals a row they are compared: on an H100 that is as fast as a rule, or faster.
MOST_AS_FAST = 4
# Of a row in no span, and of a key: before all places, and not the same, so that neither is in a span of the other.
NO_ROW = torch.iinfo(torch.int32).min
NO_KEY = NO_ROW + 1

Seen = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """A mask that the kernel evaluates, and the names of the span sets of which it reads:

    Attributes:
        mask: what of it changes from batch to batch is in tables.
        causal: rows see no key after their own, beside what the mask says.
        row_owners: where the span of a row begins, `NO_ROW` if it is in none.
        latest_ends: where the last span ends that begins at or before a row, `NO_ROW` if none does.
        key_owners: where the span of a key begins, `NO_KEY` if it is in none.
    """

    mask: Mask
    causal: bool
    row_owners: tuple[str, ...]
    latest_ends: tuple[str, ...]
    key_owners: tuple[str, ...]


class RulePairs:
    """The `Pairs` of rows and keys of a packed batch, at places in its keys."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        row_owner: Mapping[str, torch.Tensor],
        latest_end: Mapping[str, torch.Tensor],
        key_owner: Mapping[str, torch.Tensor],
    ) -> None:
        self.query, self.key = query, key
        self.row_owner, self.latest_end, self.key_owner = row_owner, latest_end, key_owner

    @property
    def sequence(self) -> int:
        raise NotImplementedError("no mask that is run by its rule reads it")

    def same_span(self, name: str) -> torch.Tensor:
        return self.row_owner[name] == self.key_owner[name]

    def query_in(self, name: str) -> torch.Tensor:
        return self.row_owner[name] > NO_ROW

    def key_in(self, name: str) -> torch.Tensor:
        return self.key_owner[name] > NO_KEY

    def query_offset(self, name: str) -> torch.Tensor:
        return torch.where(self.query_in(name), self.query - self.row_owner[name], -1)

    def key_offset(self, name: str) -> torch.Tensor:
        return torch.where(self.key_in(name), self.key - self.key_owner[name], -1)

    def before_end_of_latest(self, name: str) -> torch.Tensor:
        return self.key < self.latest_end[name]


def rule_for(mask: Mask, intervals: int) -> Rule | None:
    """The rule of a mask whose rows see up to so many intervals; None where those are compared, or searched.

    A mask has one if it is made of this library's own parts, which torch is known to compile. Each of them costs about
    a comparison, as an interval does.
    """
    if intervals <= MOST_AS_FAST:
        return None
    spelled = in_plain_parts(mask, _with_rule)
    return None if spelled is None or intervals <= _parts(spelled) else _rule(spelled)


def by_rule(rule: Rule, of_rows: tuple[torch.Tensor, ...], of_keys: tuple[torch.Tensor, ...]) -> Seen:
    """The rule as a function of a row and a key of the packed batch.

    Args:
        rule: the rule.
        of_rows: int32, one of each row: its place, then each of `row_owners`, and each of `latest_ends`.
        of_keys: int32, one of each key: each of `key_owners`.
    """
    place, *told = of_rows
    row_owner = dict(zip(rule.row_owners, told, strict=False))
    latest_end = dict(zip(rule.latest_ends, told[len(row_owner) :], strict=True))
    key_owner = dict(zip(rule.key_owners, of_keys, strict=True))

    def seen(row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        pairs = RulePairs(
            place[row],
            key.to(torch.int32),
            {name: own[row] for name, own in row_owner.items()},
            {name: own[row] for name, own in latest_end.items()},
            {name: own[key] for name, own in key_owner.items()},
        )
        return rule.mask.visible(pairs)

    return seen


def _with_rule(part: Mask) -> Mask | None:
    """A part that is no plain atom and has a rule all the same; None if it has none."""
    if isinstance(part, BlockDiffusion) and type(part) is BlockDiffusion:
        return dataclasses.replace(part, block=min(part.block, LARGEST))
    return None


def _parts(mask: Mask) -> int:
    """Of how many a mask is made."""
    return _parts(mask.left) + _parts(mask.right) if isinstance(mask, (And, Or)) else 1


class _Noted(dict[str, torch.Tensor]):
    """Has a number for every name, and so tells afterwards which were asked for."""

    def __missing__(self, name: str) -> torch.Tensor:
        return self.setdefault(name, torch.zeros((), dtype=torch.int32, device="cpu"))


@functools.lru_cache(maxsize=256)
def _rule(mask: Mask) -> Rule | None:
    factors = _factors(mask)
    others = [own for own in factors if not isinstance(own, Causal)]
    if not others:
        return None
    rest, causal = functools.reduce(operator.and_, others), len(others) < len(factors)
    row_owner, latest_end, key_owner = _Noted(), _Noted(), _Noted()
    anywhere = _Noted()["any"]
    rest.visible(RulePairs(anywhere, anywhere, row_owner, latest_end, key_owner))
    return Rule(rest, causal, *(tuple(sorted(own)) for own in (row_owner, latest_end, key_owner)))


def _factors(mask: Mask) -> list[Mask]:
    """What the mask is the `&` of."""
    return [*_factors(mask.left), *_factors(mask.right)] if isinstance(mask, And) else [mask]
