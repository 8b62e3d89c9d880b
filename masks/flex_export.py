"""A mask in FlexAttention's language: a `mask_mod(b, h, q_idx, kv_idx)`. `flex` goes the other way."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import NamedTuple, TypeGuard

import torch

from fa4_prefixlm.batch import lengths as lengths_module
from fa4_prefixlm.batch import ranges as ranges_module
from fa4_prefixlm.batch.ranges import NamedRanges, Ranges, SpanSets
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.protocols import MaskMod, SeesPairs


def to_flex(
    mask: SeesPairs, *, seqlen: int, ranges: NamedRanges = None, seqlen_q: int | None = None, device: str = "cpu"
) -> MaskMod:
    """`mask` as a `torch.nn.attention.flex_attention` mask_mod; see `Mask.flex`."""
    named = ranges_module.by_name(mask, ranges)
    counts = {len(given) for given in named.values() if _has_length(given)}
    sizes = lengths_module.batched(max(counts, default=1), seqlen, seqlen, torch.device("cpu"))
    sets = ranges_module.parse(mask, ranges, sizes)
    where = _known_device(device)
    tables = {name: _table(sets, name, seqlen, where) for name in sets}
    offset = 0 if seqlen_q is None else lengths_module.first_query(seqlen_q, seqlen)
    alike = all(given is None for given in named.values())  # the tables have one row, for a batch of any size

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        b = b * 0 if alike else b
        return mask.visible(_IndexPairs(b, q_idx + offset, kv_idx, tables))

    return mask_mod


def _has_length(given: Ranges) -> TypeGuard[Sized]:
    """`len` takes it. What it does not take is refused where ranges are parsed."""
    return given.ndim > 0 if isinstance(given, torch.Tensor) else isinstance(given, Sized)


def _known_device(device: str | torch.device) -> torch.device:
    try:
        if isinstance(device, (str, torch.device)):
            return torch.device(device)
    except RuntimeError:  # not the name of one
        pass
    raise InputError("device", "a device, such as 'cpu'", repr(device))


class _Table(NamedTuple):
    """Spans by position, `(batch, seqlen)` int64 each.

    Attributes:
        owner: index of the span that holds the position; -1: none.
        offset: tokens before the position in that span; -1: none holds it.
        latest_end: end of the last span that starts at or before the position; 0: none.
    """

    owner: torch.Tensor
    offset: torch.Tensor
    latest_end: torch.Tensor


def _table(sets: SpanSets, name: str, seqlen: int, device: torch.device) -> _Table:
    host = sets[name].on_host()
    owner = torch.full((len(host), seqlen), -1)
    offset = torch.full((len(host), seqlen), -1)
    latest_end = torch.zeros(len(host), seqlen, dtype=torch.int64)
    for sequence, spans in enumerate(host):
        for index, (start, end) in enumerate(spans):
            owner[sequence, start:end] = index
            offset[sequence, start:end] = torch.arange(len(offset[sequence, start:end]))
            latest_end[sequence, start:] = end
    return _Table(owner.to(device), offset.to(device), latest_end.to(device))


class _IndexPairs:
    """The `Pairs` of FlexAttention: one query and one key of one batch entry, under vmap."""

    def __init__(
        self, sequence: torch.Tensor, query: torch.Tensor, key: torch.Tensor, tables: Mapping[str, _Table]
    ) -> None:
        self._sequence, self.query, self.key, self.tables = sequence, query, key, tables

    @property
    def sequence(self) -> torch.Tensor:
        return self._sequence

    def same_span(self, name: str) -> torch.Tensor:
        return (self._owner(name, self.query) == self._owner(name, self.key)) & self.query_in(name)

    def query_in(self, name: str) -> torch.Tensor:
        return self._owner(name, self.query) >= 0

    def key_in(self, name: str) -> torch.Tensor:
        return self._owner(name, self.key) >= 0

    def query_offset(self, name: str) -> torch.Tensor:
        return self.tables[name].offset[self.sequence, self.query]

    def key_offset(self, name: str) -> torch.Tensor:
        return self.tables[name].offset[self.sequence, self.key]

    def before_end_of_latest(self, name: str) -> torch.Tensor:
        return self.key < self.tables[name].latest_end[self.sequence, self.query]

    def _owner(self, name: str, position: torch.Tensor) -> torch.Tensor:
        return self.tables[name].owner[self.sequence, position]
