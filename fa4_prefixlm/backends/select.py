"""Which backend runs a call, and why, as a value that can be printed and tested."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from fa4_prefixlm.backends.base import Backend, MaskedBatch, Prepared
from fa4_prefixlm.backends.causal import Causal
from fa4_prefixlm.backends.cudnn import Cudnn, CudnnCall, FlexFor
from fa4_prefixlm.backends.fa4_verdicts import PAGES_NO_GRADIENT, choose_tile
from fa4_prefixlm.backends.flex import Flex
from fa4_prefixlm.backends.gathered import Gathered, contiguous
from fa4_prefixlm.backends.native import Native
from fa4_prefixlm.backends.packed import Packed
from fa4_prefixlm.backends.reference import Reference
from fa4_prefixlm.backends.select_backward import Backward, choose_backward
from fa4_prefixlm.backends.two_pass import TwoPass
from fa4_prefixlm.backends.varlen import Varlen
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.errors import InputError, UnsupportedError
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry import block_lists
from fa4_prefixlm.geometry.traits import Traits

# In order of preference.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (Causal(), Native(), Varlen(), Packed(), TwoPass(), Cudnn(), Flex(), Reference())
}

NAMES = ("auto", *BACKENDS)

# The same for keys in pages: (name, whether the keys are gathered). Gathering was up to 10 % faster than two passes
# with pages of 16, and up to 14 % slower with larger ones (benchmarks/results/h200-serving.json).
IN_PAGES = (
    *(("causal", False), ("native", False), ("causal", True), ("native", True), ("varlen", True)),
    *(("two_pass", False), ("packed", True), ("two_pass", True), ("flex", True)),
    ("reference", True),
)

# Above this, `auto` compares the varlen block lists with the packed ones, and takes packed where it needs less.
LARGE_LISTS = 64 * 2**20


BY_NAME = "asked for by name"


@dataclass(frozen=True)
class Forward:
    """The backend of the forward.

    Attributes:
        name: of `BACKENDS`.
        reason: why this one.
        passed_over: (name, reason) of the ones preferred before it, in order.
        gathered: keys are copied out of their pages first.
    """

    name: str
    reason: str
    passed_over: tuple[tuple[str, str], ...] = ()
    gathered: bool = False

    @property
    def by_name(self) -> bool:
        """The caller named it."""
        return self.reason == BY_NAME

    @classmethod
    def after(cls, passed_over: Mapping[str, str], name: str, *, gathered: bool = False) -> Forward:
        """The first that runs the call, after those that do not."""
        return _after(tuple(passed_over.items()), name, gathered)


@dataclass(frozen=True)
class Choice:
    """The backends of a call, forward and backward, each with its reason. `print(choice)` shows the forward's.

    Attributes:
        name: the backend of the forward, as `backend=` takes it.
        reason: why the forward runs on it.
        passed_over: (name, reason) of the forward backends that were preferred and not taken, in order.
        gathered: keys are copied out of their pages first.
        forward: these four as one value.
        backward: what computes gradients, with a `name` as `backward=` takes it (None: nothing does), a `reason` and a
            `passed_over` of its own. Values of a mask may still rule it out when a gradient is first needed.
        backend: the object that runs the forward.
    """

    forward: Forward
    backward: Backward

    @classmethod
    def serving(cls, passed_over: Mapping[str, str], name: str) -> Choice:
        """The first forward that runs a plan for engines, after those that do not."""
        return cls(Forward.after(passed_over, name), Backward(None, PAGES_NO_GRADIENT))

    @property
    def name(self) -> str:
        """The backend of the forward."""
        return self.forward.name

    @property
    def reason(self) -> str:
        """Why the forward runs on it."""
        return self.forward.reason

    @property
    def passed_over(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of the forward backends that were preferred and not taken, in order."""
        return self.forward.passed_over

    @property
    def gathered(self) -> bool:
        """Keys are copied out of their pages first."""
        return self.forward.gathered

    @property
    def backend(self) -> Backend:
        """The backend of the forward."""
        return BACKENDS[self.name]

    def prepare(self, batch: MaskedBatch) -> Prepared:
        """Build the forward backend's state on the device without synchronising it."""
        if not self.gathered:
            state = self.backend.prepare(batch)
            if isinstance(state, CudnnCall) and not self.forward.by_name:
                state.or_flex = FlexFor.of(batch)
            return state
        inner, first_key = contiguous(batch, trim=self.backend is not BACKENDS[Reference.name])
        return Gathered(self.backend.prepare(inner), batch.keys, first_key, inner.lengths)

    def __str__(self) -> str:
        gathered = ", keys gathered from the cache" * self.gathered
        return f"{self.name}: {self.backend.summary}{gathered} ({self.reason})"


@functools.lru_cache(maxsize=256)
def _after(passed_over: tuple[tuple[str, str], ...], name: str, gathered: bool) -> Forward:
    names = ", ".join(own for own, _ in passed_over)
    why = f"{names} passed over" if passed_over else "the first choice"
    return Forward(name, why, passed_over, gathered)


def choose(
    name: str, spec: CallSpec, traits: Traits, lengths: Lengths, build: Build | None, backward: str = "auto"
) -> Choice:
    """The named backends, or with "auto" the first that run the call exactly.

    Raises:
        UnsupportedError: the named backend can't run the call.
        InputError: there is no such backend.
    """
    if name not in NAMES:
        raise InputError("backend", f"one of {', '.join(NAMES)}", repr(name))
    if lengths.total_q and spec.page_size is None and type(name) is type(backward) is str:
        kept = _kept_choice(name, spec.of_any_size, traits, build, backward)
        if kept is not None:
            return kept
    forward = _choose_forward(name, spec, traits, lengths, build)
    return Choice(forward, choose_backward(backward, spec, traits, build, forward=forward.name))


@functools.lru_cache(maxsize=256)
def _kept_choice(name: str, spec: CallSpec, traits: Traits, build: Build | None, backward: str) -> Choice | None:
    """What is taken, where it is the same for every batch of a kind; None where it depends on the lengths."""
    forward = _first_that_runs(spec, traits, None, build) if name == "auto" else _named(name, spec, traits, build)
    if forward is None:
        return None
    return Choice(forward, choose_backward(backward, spec, traits, build, forward=forward.name))


def _choose_forward(name: str, spec: CallSpec, traits: Traits, lengths: Lengths, build: Build | None) -> Forward:
    if lengths.total_q == 0:
        return Forward(Reference.name, "there are no queries", gathered=spec.page_size is not None)
    if name != "auto":
        return _named(name, spec, traits, build)
    first = _first_that_runs(spec, traits, lengths, build)
    assert first is not None, "it has the lengths"
    return first


def _named(name: str, spec: CallSpec, traits: Traits, build: Build | None) -> Forward:
    backend, paged = BACKENDS[name], spec.page_size is not None
    gathered = paged and (not backend.reads_pages or backend.refusal(spec, traits, build) is not None)
    refusal = backend.refusal(dataclasses.replace(spec, page_size=None) if gathered else spec, traits, build)
    if refusal is not None:
        raise UnsupportedError("backend", f"a backend that can run this call ({refusal})", repr(name))
    return Forward(backend.name, BY_NAME, gathered=gathered)


def _first_that_runs(spec: CallSpec, traits: Traits, lengths: Lengths | None, build: Build | None) -> Forward | None:
    """The first backend that runs the call exactly. lengths: None: not known, and then None if it depends on them."""
    paged = spec.page_size is not None
    copied = dataclasses.replace(spec, page_size=None) if paged else spec
    passed_over: dict[str, str] = {}
    for preferred, gathered in IN_PAGES if paged else ((name, False) for name in BACKENDS):
        backend, as_called = BACKENDS[preferred], copied if gathered else spec
        if lengths is None and backend.name == Varlen.name:
            return None
        reason = backend.refusal(as_called, traits, build)
        if reason is None:
            reason = _unasked(backend, as_called, traits, lengths, build)
        if reason is None:
            return Forward.after(passed_over, backend.name, gathered=gathered)
        passed_over.setdefault(backend.name, reason)
    raise AssertionError("the reference runs every call")


def _unasked(
    backend: Backend, spec: CallSpec, traits: Traits, lengths: Lengths | None, build: Build | None
) -> str | None:
    """Why a backend that can run the call is taken by name only; None if it is taken without."""
    if backend.name == Flex.name and spec.device.type == "cpu":
        return "on the CPU it computes every pair as well, and is there for tests"
    return _too_large(spec, traits, lengths, build) if lengths is not None and backend.name == Varlen.name else None


def _too_large(spec: CallSpec, traits: Traits, lengths: Lengths, build: Build | None) -> str | None:
    """Why the varlen block lists take too much memory: they grow with seqlen_q * seqlen_k whatever the mask."""
    tile = choose_tile(spec, traits, lengths.max_seqlen_q)
    varlen = block_lists.varlen_bytes(lengths, tile.block_m, tile.n)
    if varlen <= LARGE_LISTS:
        return None
    packed = block_lists.packed_bytes(lengths, traits, tile.block_m, tile.n)
    if packed >= varlen or BACKENDS[Packed.name].refusal(spec, traits, build) is not None:
        return None
    return f"its block lists would take {varlen / 2**20:.0f} MiB, packed ones {packed / 2**20:.0f} MiB"
