"""What all rows of a batch see, told by few of them, which are evaluated on the host.

Every end of an interval stands still from row to row, or moves along with the row, until it passes another one
(`Mask.ends`). The rows at which that may happen, and their neighbours, tell what the rows between them see. There are a
few of them for every edge of a span, and what the host knows of the batch is enough to evaluate a mask there: on a
device the same takes some hundred launches.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fa4_prefixlm.batch.frozen import with_changes
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.ranges import SpanSets
from fa4_prefixlm.device_checks import is_fake
from fa4_prefixlm.geometry.intervals import Bounds, Tokens, at_most, row_bounds, tokens
from fa4_prefixlm.geometry.traits import MOST_INTERVALS, Traits, as_run, most_spans
from fa4_prefixlm.masks.base import Mask, ends_of
from fa4_prefixlm.masks.plain_parts import few_parts
from fa4_prefixlm.masks.protocols import Ends

# Rows evaluated on the host in place of all rows on the device. A dozen or a hundred took 0.7 to 1.2 ms on the hosts of
# H100s, nearly all of it what torch's operations cost however few rows they get; so do the launches that they replace.
MOST_ROWS = 2048


class Pieces(NamedTuple):
    """The bounds of all rows of a batch, in pieces, on the host; int32.

    Row `r` of the piece that begins at `row[i]` has the bounds of that row; if those of row `row[i + 1]` are
    `row[i + 1] - row[i]` greater, they move along with the row, and are `r - row[i]` greater.

    Attributes:
        row: `(pieces,)` ascending, the first 0, the last the last row of the batch.
        lo, hi: `(pieces, K)` as those of `Bounds`.
    """

    row: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor

    def say_all(self) -> bool:
        """Every bound stands still or moves along with the row, in every piece of more than one row."""
        length = self.row.diff().unsqueeze(1)
        lo, hi = self.lo.diff(dim=0), self.hi.diff(dim=0)
        fine = ((lo == 0) | (lo == length)) & ((hi == 0) | (hi == length))
        return bool((fine | (length == 1)).all())

    def bounds(self, total_q: int, device: torch.device) -> Bounds:
        """The bounds of all rows. `kernels.pieces` does the same in one launch."""
        row = torch.arange(total_q, dtype=torch.int32, device=device)
        begin = self.row.to(device)
        piece = torch.searchsorted(begin, row, right=True, out_int32=True) - 1
        following = (piece + 1).clamp(max=len(begin) - 1)
        first = begin.index_select(0, piece)
        past, length = (row - first).unsqueeze(1), (begin.index_select(0, following) - first).unsqueeze(1)

        def spread(values: torch.Tensor) -> torch.Tensor:
            here, there = (values.to(device).index_select(0, at) for at in (piece, following))
            return here + past * (there - here == length)

        return Bounds(spread(self.lo), spread(self.hi))


class TellingRows:
    """The rows of a batch that tell what all of them see; listed and evaluated when they are first looked at.

    Attributes:
        mask: the mask.
        spans, lengths: of the batch, on any device.
    """

    def __init__(self, mask: Mask, spans: SpanSets, lengths: Lengths) -> None:
        self.mask, self.spans, self.lengths = mask, spans, lengths

    @functools.cached_property
    def known(self) -> bool:
        """The host can evaluate the mask, and waits for no device."""
        starts = (self.lengths.key_start, self.lengths.query_start)
        if self.mask.evaluated or is_fake(self.lengths.cu_seqlens_q) or not self.lengths.known:
            return False
        if any(own is not None and own.device.type != "cpu" for own in starts):
            return False
        return all(own.host is not None for own in self.spans.values())

    @functools.cached_property
    def bounds(self) -> Bounds:
        """What these rows see, on the host."""
        spans = {name: with_changes(own, values=own.host_values()) for name, own in self.spans.items()}
        return row_bounds(self.mask, spans, self._on_host, self.where)

    @functools.cached_property
    def where(self) -> Tokens:
        """Their places, on the host; of a mask that does not say where its intervals end, all rows tell."""
        ends = ends_of(self.mask)
        return tokens(self._on_host, None if ends is None else self._listed(ends))

    def one_sees_more_than(self, most: int) -> bool:
        """A row that is likely to see many intervals sees more than these, told in Python; False also if not told."""
        seqlens_q, seqlens_k = self.lengths.on_host()
        base, _ = as_run(self.mask, most_spans(self.spans))
        parts = few_parts(base)
        if parts is None or self.lengths.total_q == 0 or not self.lengths.is_aligned:
            return False
        sets = {name: own.on_host() for name, own in self.spans.items()}
        with_rows = (index for index, rows in enumerate(seqlens_q) if rows)
        row = max(with_rows, key=lambda index: sum(len(sets[name][index]) for name in parts.names))
        keys, spans = seqlens_k[row], {name: own[row] for name, own in sets.items()}
        # Of no more keys than hold a span too many, for the first: a row sees no fewer intervals of all.
        first = max((own[most + 1][0] for own in spans.values() if len(own) > most + 1), default=keys)
        return any(len(parts.seen(keys - 1, count, spans)) > most for count in sorted({min(first, keys), keys}))

    def pieces(self, most: int) -> Pieces | None:
        """The bounds of all rows as pieces.

        None: the rows do not tell them, or so many would have to be evaluated that all rows on the device are faster.

        most: intervals of a row, see `row_bounds`.
        """
        ends = ends_of(self.mask)
        if not self.known or ends is None or self.lengths.total_q == 0:
            return None
        if "bounds" not in vars(self) and self._at_most(ends) > MOST_ROWS:
            return None
        bounds, row = at_most(most, self.mask, self.bounds, self.where), self.where.row
        assert row is not None
        found = Pieces(row, bounds.lo, bounds.hi)
        return found if found.say_all() else None

    @functools.cached_property
    def _on_host(self) -> Lengths:
        return self.lengths.as_on_host()

    def _at_most(self, ends: Ends) -> int:
        """Upper bound of how many rows tell."""
        seqlens_q, _ = self.lengths.on_host()
        if len(seqlens_q) > MOST_ROWS:
            return len(seqlens_q)
        near, shifts = len(_near(ends)), len(ends.of_span | {0})
        sets = [own.on_host() for own in self.spans.values()]
        return sum(
            min(count, 2 + near * (3 + 2 * shifts * sum(len(own[index]) for own in sets)))
            for index, count in enumerate(seqlens_q)
        )

    def _listed(self, ends: Ends) -> torch.Tensor:
        """The rows, `(n,)` int32 on the host: those at which an end may pass another one, and their neighbours."""
        rows: list[int] = []
        seqlens_q, seqlens_k = self._on_host.on_host()
        firsts, keys_at = self._on_host.starts_on_host()
        sets = [own.on_host() for own in self.spans.values()]
        near, shifts = _near(ends), ends.of_span | {0}
        first_row = 0
        for index, (count, keys) in enumerate(zip(seqlens_q, seqlens_k, strict=True)):
            edges = {edge for own in sets for span in own[index] for edge in span}
            fixed = {0, keys_at[index], keys_at[index] + keys} | {edge + by for edge in edges for by in shifts}
            base = first_row - firsts[index]
            end_row = first_row + count
            at = {edge + by for edge in (own + base for own in fixed) for by in near} | {first_row, end_row - 1}
            rows += sorted(row for row in at if first_row <= row < end_row)
            first_row = end_row
        return torch.tensor(rows, dtype=torch.int32, device="cpu")


def measured(asked: Traits, telling: TellingRows) -> Traits:
    """`asked` with the intervals that rows really see, where the formula's bound is above what kernels take.

    Where they see more than that as well it may still be the bound: what runs such a mask does not ask how many.

    Only uses values that are on the host: nothing synchronises, unless evaluating the mask does.
    """
    evaluated = telling.mask.evaluated
    if asked.intervals <= MOST_INTERVALS or asked.custom or not (telling.known or evaluated):
        return asked
    if not evaluated and telling.one_sees_more_than(MOST_INTERVALS):
        return asked
    if evaluated:
        bounds = row_bounds(telling.mask, telling.spans, telling.lengths, tokens(telling.lengths))
    else:
        bounds = telling.bounds
    seen = (bounds.lo < bounds.hi).sum(1)
    return with_changes(asked, intervals=max(1, int(seen.max()) if len(seen) else 1))


def _near(ends: Ends) -> set[int]:
    """So many tokens from where a fixed end stands, an end that moves along with the row is at it or beside it."""
    return {near - by for by in ends.of_row | {0} for near in (-1, 0, 1)}
