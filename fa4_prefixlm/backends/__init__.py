"""Which backend runs a call, and why: a value that can be printed and tested."""

from __future__ import annotations

from dataclasses import dataclass

from .. import blocks
from ..call import CallSpec
from ..errors import InputError, UnsupportedError
from ..intervals import Demand
from ..lengths import Lengths
from .base import Backend, Options, Prepared, Work
from .fa4_common import choose_tile
from .packed import Packed
from .reference import Reference
from .varlen import Varlen

__all__ = ["BACKENDS", "Backend", "Choice", "Options", "Prepared", "Work", "choose"]

# In order of preference.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Varlen(), Packed(), Reference())}

# Above this, `auto` compares the varlen block lists with the packed ones, and takes packed where it needs less.
LARGE_LISTS = 64 * 2**20


@dataclass(frozen=True)
class Choice:
    """The backend of a call. passed_over: (name, reason) of the ones preferred before it, in order."""

    name: str
    reason: str
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.name]

    def __str__(self) -> str:
        return f"{self.name}: {self.backend.summary} ({self.reason})"


def choose(name: str, call: CallSpec, demand: Demand, lengths: Lengths) -> Choice:
    """Take the named backend, or with "auto" the first that runs the call exactly.

    Raises `UnsupportedError` if the named backend can't run the call; `InputError` if there is no such backend.
    """
    if name not in ("auto", *BACKENDS):
        raise InputError("backend", f"one of {', '.join(['auto', *BACKENDS])}", repr(name))
    if lengths.total_q == 0:
        return Choice(Reference.name, "there are no queries")
    if name != "auto":
        refusal = BACKENDS[name].refusal(call, demand)
        if refusal is not None:
            raise UnsupportedError("backend", f"a backend that can run this call ({refusal})", repr(name))
        return Choice(name, "asked for by name")
    passed_over: list[tuple[str, str]] = []
    for backend in BACKENDS.values():
        reason = backend.refusal(call, demand)
        if reason is None and backend.name == "varlen":
            reason = _too_large(call, demand, lengths)
        if reason is None:
            why = f"{', '.join(name for name, _ in passed_over)} passed over" if passed_over else "the first choice"
            return Choice(backend.name, why, tuple(passed_over))
        passed_over.append((backend.name, reason))
    raise AssertionError("the reference runs every call")


def _too_large(call: CallSpec, demand: Demand, lengths: Lengths) -> str | None:
    """Why the varlen block lists would take too much memory; they grow with seqlen_q * seqlen_k whatever the mask."""
    tile = choose_tile(call, demand, lengths.max_seqlen_q)
    varlen = blocks.varlen_bytes(lengths, tile.block_m, tile.n)
    if varlen <= LARGE_LISTS:
        return None
    packed = blocks.packed_bytes(lengths, demand, tile.block_m, tile.n)
    if packed >= varlen or BACKENDS[Packed.name].refusal(call, demand) is not None:
        return None
    return f"its block lists would take {varlen / 2**20:.0f} MiB, packed ones {packed / 2**20:.0f} MiB"
