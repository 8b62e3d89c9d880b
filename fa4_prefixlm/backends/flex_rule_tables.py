"""What the kernel of `flex` reads of each token where a mask's own rule tells what rows see (`flex_rule`).

Some twenty operations on the device, or one launch of a kernel; nothing synchronises.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.backends.flex_attend import BLOCK, LEAST_INT32, free
from fa4_prefixlm.backends.flex_rule import NO_KEY, NO_ROW, Rule
from fa4_prefixlm.geometry.intervals import Tokens
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, Intervals


def rule_tables(batch: MaskedBatch, rule: Rule, rows: int, keys: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`(Tables.ends, Tables.of_keys)` of a batch. rows, keys: in blocks."""
    queries, packed_keys = _Places(batch, batch.where), _keys_as_queries(batch)
    if packed_keys is None:
        packed_keys = queries
    where = queries.where
    place, count = where.position + queries.shift, where.seqlen_k
    if rule.causal:
        count = torch.minimum(count, (place + 1 - where.key_offset).clamp(min=0))
    of_rows = [
        where.key_offset ^ LEAST_INT32,
        count ^ LEAST_INT32,
        place,
        *map(queries.owner, rule.row_owners),
        *map(queries.latest_end, rule.latest_ends),
    ]
    of_keys = [packed_keys.owner(name).clamp(min=NO_KEY) for name in rule.key_owners]
    # Rows past the batch see an interval of no keys, and keys past it are in no row's.
    return _in_blocks(of_rows, rows), _in_blocks(of_keys, keys) if of_keys else None


def rule_tables_in_one_launch(
    batch: MaskedBatch, rule: Rule, rows: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same by a kernel, where the batch is of the kind that it works on."""
    from fa4_prefixlm.kernels.token_tables import rule_numbers, takes

    told = rule.row_owners, rule.latest_ends, rule.key_owners
    if not takes(sorted({*itertools.chain(*told)}), batch.spans, batch.lengths):
        return rule_tables(batch, rule, rows, keys)
    of_rows, of_keys = rule_numbers(
        batch.spans, batch.lengths, *told, causal=rule.causal, rows=rows, keys=keys, block=BLOCK
    )
    return free(of_rows, 1), free(of_keys, 1) if rule.key_owners else None


class _Places:
    """Tokens of a batch at their places in its packed keys, and spans moved along with them."""

    def __init__(self, batch: MaskedBatch, where: Tokens) -> None:
        self.batch, self.where = batch, where
        self.shift = where.key_offset if where.key_start is None else where.key_offset - where.key_start
        self._latest: dict[str, Intervals] = {}
        self._owners: dict[str, torch.Tensor] = {}

    def owner(self, name: str) -> torch.Tensor:
        """Where the span begins that holds the token; `NO_ROW`: none does."""
        if name not in self._owners:
            start, end = self._latest_span(name)
            self._owners[name] = (start + self.shift).masked_fill(self.where.position >= end, NO_ROW)
        return self._owners[name]

    def latest_end(self, name: str) -> torch.Tensor:
        """Where the last span ends, among the keys, that begins at or before the token; `NO_ROW`: none does."""
        _, end = self._latest_span(name)
        among_keys = torch.minimum(end, self.where.key_end)  # those to come are not here: any position fits int32
        return (among_keys + self.shift).masked_fill(end == EMPTY_HI, NO_ROW)

    def _latest_span(self, name: str) -> Intervals:
        if name not in self._latest:
            where, spans = self.where, self.batch.spans[name]
            self._latest[name] = self.batch.find_latest(spans, where.sequence, where.position)
        return self._latest[name]


def _keys_as_queries(batch: MaskedBatch) -> _Places | None:
    """The places of the keys; None: they are those of the queries."""
    lengths = batch.lengths
    if lengths.same and lengths.is_bottom_right and lengths.total_q == lengths.total_k:
        return None
    as_queries = dataclasses.replace(
        lengths,
        cu_seqlens_q=lengths.cu_seqlens_k,
        total_q=lengths.total_k,
        max_seqlen_q=lengths.max_seqlen_k,
        seqlens_q=lengths.seqlens_k,
        same=True,
        query_start=None,
    )
    of_keys = dataclasses.replace(batch, lengths=as_queries)
    return _Places(of_keys, of_keys.where)


def _in_blocks(columns: list[torch.Tensor], blocks: int) -> torch.Tensor:
    """`(n, blocks, BLOCK)` of n times int32 `(tokens,)`."""
    missing = blocks * BLOCK - columns[0].shape[0]
    padded = torch.nn.functional.pad(torch.stack(columns), (0, missing), value=LEAST_INT32)
    return free(padded.unflatten(1, (-1, BLOCK)), 1)
