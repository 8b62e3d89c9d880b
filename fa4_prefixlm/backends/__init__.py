"""Which backend runs a call, and why: a value that can be printed and tested."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from .. import blocks
from ..call import CallSpec
from ..errors import InputError, UnsupportedError
from ..fa4.build import Build
from ..intervals import Demand
from ..lengths import Lengths
from .base import Backend, Options, Prepared, Work
from .causal import Causal
from .fa4_common import choose_tile
from .gathered import Gathered, contiguous
from .native import Native
from .packed import Packed
from .reference import Reference
from .two_pass import TwoPass
from .varlen import Varlen

__all__ = ["BACKENDS", "Backend", "Choice", "Options", "Prepared", "Work", "choose"]

# In order of preference.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Causal(), Native(), Varlen(), Packed(), TwoPass(), Reference())
}

# The same with keys in pages: (name, whether the keys are gathered). Gathering was up to 9 % faster than two passes
# with pages of 16, and up to 14 % slower with larger ones (benchmarks/results/h200-serving.json).
IN_PAGES = (
    *(("causal", False), ("native", False), ("causal", True), ("native", True), ("varlen", True)),
    *(("two_pass", False), ("packed", True), ("two_pass", True), ("reference", True)),
)

# Above this, `auto` compares the varlen block lists with the packed ones, and takes packed where it needs less.
LARGE_LISTS = 64 * 2**20


@dataclass(frozen=True)
class Choice:
    """The backend of a call. passed_over: (name, reason) of the ones preferred before it, in order.

    gathered: it reads contiguous keys, which are copied out of their pages first.
    """

    name: str
    reason: str
    passed_over: tuple[tuple[str, str], ...] = ()
    gathered: bool = False

    @classmethod
    def after(cls, passed_over: Mapping[str, str], name: str, *, gathered: bool = False) -> Choice:
        """The first that runs the call, after those that do not."""
        why = f"{', '.join(passed_over)} passed over" if passed_over else "the first choice"
        return cls(name, why, tuple(passed_over.items()), gathered)

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.name]

    def prepare(self, work: Work) -> Prepared:
        """Build the backend's state on the device without synchronising it."""
        if not self.gathered:
            return self.backend.prepare(work)
        assert work.pages is not None
        inner, first_key = contiguous(work, trim=self.backend is not BACKENDS[Reference.name])
        return Gathered(self.backend.prepare(inner), work.pages, first_key, inner.lengths)

    def __str__(self) -> str:
        gathered = ", keys gathered from their pages" * self.gathered
        return f"{self.name}: {self.backend.summary}{gathered} ({self.reason})"


def choose(name: str, call: CallSpec, demand: Demand, lengths: Lengths, build: Build | None) -> Choice:
    """Take the named backend, or with "auto" the first that runs the call exactly.

    Raises `UnsupportedError` if the named backend can't run the call; `InputError` if there is no such backend.
    """
    if name not in ("auto", *BACKENDS):
        raise InputError("backend", f"one of {', '.join(['auto', *BACKENDS])}", repr(name))
    paged = call.page_size is not None
    if lengths.total_q == 0:
        return Choice(Reference.name, "there are no queries", gathered=paged)
    copied = dataclasses.replace(call, page_size=None)
    if name != "auto":
        gathered = paged and (not BACKENDS[name].reads_pages or BACKENDS[name].refusal(call, demand, build) is not None)
        refusal = BACKENDS[name].refusal(copied if gathered else call, demand, build)
        if refusal is not None:
            raise UnsupportedError("backend", f"a backend that can run this call ({refusal})", repr(name))
        return Choice(name, "asked for by name", gathered=gathered)
    passed_over: dict[str, str] = {}
    for preferred, gathered in IN_PAGES if paged else ((name, False) for name in BACKENDS):
        backend, as_called = BACKENDS[preferred], copied if gathered else call
        reason = backend.refusal(as_called, demand, build)
        if reason is None and backend.name == Varlen.name:
            reason = _too_large(as_called, demand, lengths, build)
        if reason is None:
            return Choice.after(passed_over, backend.name, gathered=gathered)
        passed_over.setdefault(backend.name, reason)
    raise AssertionError("the reference runs every call")


def _too_large(call: CallSpec, demand: Demand, lengths: Lengths, build: Build | None) -> str | None:
    """Why the varlen block lists would take too much memory; they grow with seqlen_q * seqlen_k whatever the mask."""
    tile = choose_tile(call, demand, lengths.max_seqlen_q)
    varlen = blocks.varlen_bytes(lengths, tile.block_m, tile.n)
    if varlen <= LARGE_LISTS:
        return None
    packed = blocks.packed_bytes(lengths, demand, tile.block_m, tile.n)
    if packed >= varlen or BACKENDS[Packed.name].refusal(call, demand, build) is not None:
        return None
    return f"its block lists would take {varlen / 2**20:.0f} MiB, packed ones {packed / 2**20:.0f} MiB"
