"""Which backward computes the gradients of a call, and why: known before the forward runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fa4_prefixlm.backends.base import BackwardBackend, Gradients, MaskedBatch, Refusal
from fa4_prefixlm.backends.causal_backward import CausalBackward
from fa4_prefixlm.backends.cudnn import FlexFor
from fa4_prefixlm.backends.cudnn_backward import CudnnBackward, CudnnGradients
from fa4_prefixlm.backends.fa4_verdicts import PAGES_NO_GRADIENT
from fa4_prefixlm.backends.flex_backward import FlexBackward
from fa4_prefixlm.backends.native_backward import NativeBackward
from fa4_prefixlm.backends.packed_backward import PackedBackward
from fa4_prefixlm.backends.reference import Reference
from fa4_prefixlm.backends.reference_backward import ReferenceBackward
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.errors import InputError, UnsupportedError
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry.traits import Traits

# In order of preference.
BACKWARDS: dict[str, BackwardBackend] = {
    backward.name: backward
    for backward in (
        *(CausalBackward(), NativeBackward(), PackedBackward()),
        *(CudnnBackward(), FlexBackward(), ReferenceBackward()),
    )
}


@dataclass(frozen=True)
class Backward:
    """What computes gradients.

    Attributes:
        name: of `BACKWARDS`; None: nothing does.
        reason: why.
        passed_over: (name, reason) of the ones preferred before it, in order.
    """

    name: str | None
    reason: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if self.name is None:
            return f"none ({self.reason})"
        return f"{self.name}: {BACKWARDS[self.name].summary} ({self.reason})"


def choose_backward(
    name: str,
    spec: CallSpec,
    traits: Traits,
    build: Build | None,
    *,
    forward: str,
    deterministic: bool = False,
    refused: Mapping[str, str] | None = None,
) -> Backward:
    """Take the named backward, or with "auto" the first that runs the call exactly.

    Args:
        forward: the backend of the forward.
        refused: by name, those that the values of the mask rule out.

    Raises:
        InputError: there is no such backward.
        UnsupportedError: the named backward can't run the call.
    """
    if name not in ("auto", *BACKWARDS):
        raise InputError("backward", f"one of {', '.join(['auto', *BACKWARDS])}", repr(name))
    if forward == Reference.name and name in ("auto", Reference.name):
        return Backward(Reference.name, "autograd through its torch operations")
    if spec.page_size is not None:
        if name != "auto":
            raise UnsupportedError("backward", "contiguous keys", f"{name!r} for keys in pages")
        return Backward(None, PAGES_NO_GRADIENT)
    found = refused or {}
    passed_over: dict[str, str] = {}
    for preferred in BACKWARDS if name == "auto" else (name,):
        reason = found.get(preferred)
        if reason is None:
            reason = BACKWARDS[preferred].refusal(spec, traits, build, deterministic=deterministic)
        if reason is None and name != "auto":
            return Backward(preferred, "asked for by name")
        if reason is None:
            why = f"{', '.join(passed_over)} passed over" if passed_over else "the first choice"
            return Backward(preferred, why, tuple(passed_over.items()))
        passed_over[preferred] = reason
    expected = f"a {'deterministic ' * deterministic}backward that can run this call ({passed_over[name]})"
    raise UnsupportedError("backward", expected, repr(name))


def prepare_backward(name: str, batch: MaskedBatch, *, forward: str, deterministic: bool) -> tuple[Backward, Gradients]:
    """The backward of a batch, and its state on the device.

    Raises:
        UnsupportedError: as `choose_backward`, or keys in pages.
    """
    if batch.spec.page_size is not None:
        raise UnsupportedError("q, k, v", "no gradient of keys in pages, but in eager code on the reference", "one")
    refused: dict[str, str] = {}
    while True:
        chosen = choose_backward(
            *(name, batch.spec, batch.traits, batch.build),
            forward=forward,
            deterministic=deterministic,
            refused=refused,
        )
        if chosen.name is None:
            expected = f"no gradient: {chosen.reason} (torch.no_grad(), or backend='reference')"
            raise UnsupportedError("q, k, v", expected, "requires_grad")
        state = BACKWARDS[chosen.name].prepare(batch, deterministic=deterministic)
        if isinstance(state, CudnnGradients) and name == "auto":
            state.or_flex = FlexFor.of(batch)
        if not isinstance(state, Refusal):
            return chosen, state
        refused[chosen.name] = state.reason
