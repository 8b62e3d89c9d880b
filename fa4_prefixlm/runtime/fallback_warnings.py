"""Warnings about the backend that was chosen: it is slow, or another FA4 would have a faster one."""

from __future__ import annotations

import pathlib
import sys
import warnings

from fa4_prefixlm.backends.causal_backward import CausalBackward
from fa4_prefixlm.backends.reference import Reference
from fa4_prefixlm.backends.reference_backward import ReferenceBackward
from fa4_prefixlm.backends.select import BACKENDS, Choice, choose
from fa4_prefixlm.backends.select_backward import Backward
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import BEST, Build
from fa4_prefixlm.geometry.traits import Traits

# No build has anything faster, so that nothing has to be looked up for them.
FASTEST = ("causal", "native")

_warned: set[str] = set()


def faster_elsewhere(
    choice: Choice, spec: CallSpec, traits: Traits, lengths: Lengths, build: Build | None
) -> str | None:
    """How the newest build that we know would run a call that `build` runs by `choice`; None if not better.

    build: None: there is none.
    """
    best = choose("auto", spec, traits, lengths, BEST)
    order = list(BACKENDS)
    if order.index(choice.name) <= order.index(best.name):
        return None
    why = dict(choice.passed_over).get(best.name, "it is not offered")
    # varlen and packed are within a few percent of each other, either way.
    faster = "" if (choice.name, best.name) == ("packed", "varlen") else ", which is faster"
    here = "without FlashAttention-4" if build is None else str(build)
    return f"{here}: fa4_prefixlm takes {choice.name}, not {best.name}: {why}. {BEST} takes {best.name}{faster}"


def warn_of_fallback(choice: Choice, spec: CallSpec, traits: Traits, lengths: Lengths, build: Build | None) -> None:
    """Warn of the dense reference on a GPU, and once per process of what another build would do better."""
    if spec.device.type != "cuda" or not choice.passed_over:
        return
    if choice.name == Reference.name:
        why = choice.passed_over[-1][1]
        warnings.warn(
            f"fa4_prefixlm takes the dense reference, slow on long sequences: {why}", stacklevel=_callers_level()
        )
    if choice.name in FASTEST or (build is None and choice.name == Reference.name):
        return
    better = faster_elsewhere(choice, spec, traits, lengths, build)
    if better is not None and better not in _warned:
        _warned.add(better)
        warnings.warn(better, stacklevel=_callers_level())


def warn_of_slow_backward(backward: Backward, spec: CallSpec) -> None:
    """Warn of gradients by the dense reference on a GPU, where nobody asked for them."""
    if spec.device.type != "cuda" or backward.name != ReferenceBackward.name or not backward.passed_over:
        return
    why = "; ".join(f"not {name}: {reason}" for name, reason in backward.passed_over if name != CausalBackward.name)
    warnings.warn(
        f"fa4_prefixlm computes gradients by the dense reference, slow on long sequences ({why})",
        stacklevel=_callers_level(),
    )


_PACKAGE = str(pathlib.Path(__file__).parents[1])
_MASKS = str(pathlib.Path(_PACKAGE, "masks").resolve())


def _callers_level() -> int:
    """The `stacklevel` of the first line outside of this package, counted from the function that calls this one."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, _MASKS)):
        level, frame = level + 1, frame.f_back
    return level
