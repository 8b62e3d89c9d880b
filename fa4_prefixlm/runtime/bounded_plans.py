"""A plan whose mask is data: for each query row the bounds of the keys it sees, made elsewhere, on the device."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.backends.select import Choice, choose
from fa4_prefixlm.batch import lengths
from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry.traits import Traits
from fa4_prefixlm.masks.given import GivenRows
from fa4_prefixlm.masks.protocols import Reach
from fa4_prefixlm.runtime.plans import Plan


@dataclass(frozen=True)
class BoundedBatch:
    """A batch under given bounds, to choose a backend for and to make a plan of. Nothing here synchronises.

    Attributes:
        spec: what the tensors look like, batched.
        bounds: `(batch, seqlen_q, 2 * n)` int32 on their device, see `GivenRows`. Bounds past the keys mean their end;
            there may be more keys than any row sees, and more rows than keys.
        from_key_0: every row's first interval is known to begin at key 0.
        reach: no row sees more keys than this, as far as is known. It picks a tile, and sizes nothing.
    """

    spec: CallSpec
    bounds: torch.Tensor
    from_key_0: bool = False
    reach: int | None = None

    def __post_init__(self) -> None:
        spec, bounds = self.spec, self.bounds
        if not spec.batched:
            raise InputError("q", "(batch, seqlen, heads, head_dim) with given bounds", f"shape {spec.shape_q}")
        if bounds.dtype != torch.int32 or bounds.device != spec.device:
            raise InputError("bounds", f"int32 on {spec.device}", f"{bounds.dtype} on {bounds.device}")
        if bounds.ndim != 3 or tuple(bounds.shape[:2]) != spec.shape_q or bounds.shape[2] % 2 or not bounds.shape[2]:
            raise InputError("bounds", f"shape {(*spec.shape_q, '2 n')}", tuple(bounds.shape))

    @property
    def traits(self) -> Traits:
        """What the bounds ask of a kernel."""
        n = self.bounds.shape[2] // 2
        # The key tiles of one interval a row are a run, wherever the rows stand.
        return Traits(n, tagged=False, banded=n == 1, reach=Reach(self.reach, None), from_key_0=self.from_key_0)

    @functools.cached_property
    def lengths(self) -> Lengths:
        """The lengths; a row's position is its number in the sequence."""
        (batch, rows), keys = self.spec.shape_q, self.spec.shape_k[1]
        sizes = lengths.batched(batch, rows, keys, self.spec.device, more_queries=True)
        start = torch.zeros(batch, dtype=torch.int32, device=self.spec.device)
        return dataclasses.replace(sizes, more_queries=False, query_start=start)

    def choose(self, build: Build | None, backend: str = "auto") -> Choice:
        """The backend that runs it, and why."""
        return choose(backend, self.spec, self.traits, self.lengths, build)

    def plan(self, build: Build | None, choice: Choice) -> Plan:
        """The plan, for tensors like `spec`. `choice` is what `choose` said."""
        sizes = self.lengths
        mask, keys = GivenRows(self.bounds), Keys.contiguous(sizes)
        batch = MaskedBatch(self.spec, mask, {}, sizes, self.traits, keys, build)
        return Plan(batch, choice)
