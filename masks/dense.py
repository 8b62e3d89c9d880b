"""A mask pair by pair: bool `(queries, keys)` of one sequence, from `Mask.visible` and spans, not intervals."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fa4_prefixlm.batch.lengths import first_query
from fa4_prefixlm.batch.ranges import SequenceSpans
from fa4_prefixlm.masks.protocols import SeesPairs

SequenceSets = Mapping[str, SequenceSpans]


class DensePairs:
    """The `Pairs` of rows at `position` against all keys of a sequence, by looking at every span."""

    def __init__(
        self, position: torch.Tensor, seqlen_k: int, spans: SequenceSets, sequence: int = 0, key_start: int = 0
    ) -> None:
        self.query = position[:, None]
        self.key = torch.arange(key_start, key_start + seqlen_k, device=position.device)[None]
        self.spans, self._sequence = spans, sequence

    @property
    def sequence(self) -> int:
        return self._sequence

    def same_span(self, name: str) -> torch.Tensor:
        result = torch.zeros(len(self.query), self.key.shape[1], dtype=torch.bool, device=self.key.device)
        for start, end in self.spans[name]:
            result |= _inside(self.query, start, end) & _inside(self.key, start, end)
        return result

    def query_in(self, name: str) -> torch.Tensor:
        return self._in_any(self.query, name)

    def key_in(self, name: str) -> torch.Tensor:
        return self._in_any(self.key, name)

    def query_offset(self, name: str) -> torch.Tensor:
        return self._offset(self.query, name)

    def key_offset(self, name: str) -> torch.Tensor:
        return self._offset(self.key, name)

    def before_end_of_latest(self, name: str) -> torch.Tensor:
        end = torch.zeros_like(self.query)
        for start, own_end in sorted(self.spans[name]):
            end = torch.where(self.query >= start, own_end, end)
        return self.key < end

    def _offset(self, position: torch.Tensor, name: str) -> torch.Tensor:
        result = torch.full_like(position, -1)
        for start, end in self.spans[name]:
            result = torch.where(_inside(position, start, end), position - start, result)
        return result

    def _in_any(self, position: torch.Tensor, name: str) -> torch.Tensor:
        result = torch.zeros_like(position, dtype=torch.bool)
        for start, end in self.spans[name]:
            result |= _inside(position, start, end)
        return result


def mask_rows(mask: SeesPairs, pairs: DensePairs) -> torch.Tensor:
    """Bool `(rows, keys)` of the rows of `pairs`."""
    return mask.visible(pairs).expand(len(pairs.query), pairs.key.shape[1])


def dense_mask(mask: SeesPairs, seqlen_q: int, seqlen_k: int, spans: SequenceSets) -> torch.Tensor:
    """Bool `(seqlen_q, seqlen_k)` on the CPU: the mask of one sequence with the spans `{name: ((start, end), ...)}`."""
    position = torch.arange(first_query(seqlen_q, seqlen_k), seqlen_k)
    return mask_rows(mask, DensePairs(position, seqlen_k, spans))


def _inside(position: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return (position >= start) & (position < end)
