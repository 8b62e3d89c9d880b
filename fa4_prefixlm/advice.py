"""What to tell the user about the backend that was chosen: that it is slow, or that another FA4 would have a faster."""

from __future__ import annotations

import warnings

from . import backends
from .backends import BACKENDS, Choice
from .call import CallSpec
from .fa4.build import BEST, Build
from .intervals import Demand
from .lengths import Lengths

# No build has anything faster, so that nothing has to be looked up for them.
FASTEST = ("causal", "native")

_told: set[str] = set()


def step_down(choice: Choice, call: CallSpec, demand: Demand, lengths: Lengths, build: Build) -> str | None:
    """How the newest build that we know would run a call that `build` runs by `choice`; None if not better."""
    best = backends.choose("auto", call, demand, lengths, BEST)
    order = list(BACKENDS)
    if order.index(choice.name) <= order.index(best.name):
        return None
    why = dict(choice.passed_over).get(best.name, "it is not offered")
    # varlen and packed are within a few percent of each other, either way.
    faster = "" if (choice.name, best.name) == ("packed", "varlen") else ", which is faster"
    return f"{build}: fa4_prefixlm takes {choice.name}, not {best.name}: {why}. {BEST} takes {best.name}{faster}"


def tell(choice: Choice, call: CallSpec, demand: Demand, lengths: Lengths, build: Build | None) -> None:
    """Warn of the dense reference on a GPU, and once per process of what another build would do better."""
    if call.device.type != "cuda" or not choice.passed_over:
        return
    if choice.name == "reference":
        why = choice.passed_over[-1][1]
        warnings.warn(f"fa4_prefixlm takes the dense reference, slow on long sequences: {why}", stacklevel=4)
    if build is None or choice.name in FASTEST:
        return
    better = step_down(choice, call, demand, lengths, build)
    if better is not None and better not in _told:
        _told.add(better)
        warnings.warn(better, stacklevel=4)
