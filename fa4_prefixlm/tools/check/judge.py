"""What was measured of a build (values that cross process borders as JSON), and verdicts on it (pure functions)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fa4_prefixlm.fa4.builds.defects import Defect
from fa4_prefixlm.testing.accuracy import relative_error
from fa4_prefixlm.testing.bands import Errors, causal_limits, limits
from fa4_prefixlm.tools.check.cases import Case

# FA4's own causal call on the tensors of a case, without its spans: a path like any other, and the peer of the others.
CAUSAL = "causal"

RAN, COMPILED, REFUSED, FAILED = "ran", "compiled", "refused", "failed"


@dataclass(frozen=True)
class Outcome:
    """One case on one backend of one build.

    status: `RAN`, `COMPILED` (not run), `REFUSED` (the backend's own refusal) or `FAILED`. reason: of the latter two.
    error: relative error of the output against float64. row_error: the largest of a single token and head, `row_at`
        says where. lse_error: the largest absolute one. Each is NaN or infinite where the output is.
    bad_rows: tokens with an element that is not finite, which is also what a token looks like that was never written.
    repeats: a second run gave the same bits. digest: hash of output and LSE. kernel: what ran, in the plan's words.
    """

    case: str
    backend: str
    status: str
    reason: str = ""
    error: float | None = None
    row_error: float | None = None
    row_at: str = ""
    lse_error: float | None = None
    bad_rows: int = 0
    repeats: bool = True
    digest: str = ""
    kernel: str = ""
    seconds: float = 0.0

    @property
    def errors(self) -> Errors | None:
        """None where it did not run."""
        if self.error is None or self.row_error is None or self.lse_error is None:
            return None
        return Errors(self.error, self.row_error, self.lse_error)


@dataclass(frozen=True)
class Speed:
    """How fast a backend is. ms: of one call. of_causal: its exact TFLOP/s over those of FA4's causal call, measured in
    turns with it.
    """

    case: str
    backend: str
    ms: float
    tflops: float
    of_causal: float
    spread: float


@dataclass(frozen=True)
class ProbeOutcome:
    """What the bare build did. status: "right", "wrong", "raised" or "skipped"; reason: why, of the latter two."""

    name: str
    status: str
    reason: str = ""
    error: float | None = None


def in_short(error: BaseException | str) -> str:
    """An error as one line, without this machine's folders: others read the reports."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # compilers colour their messages
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"(?<![\w.])(?:/[\w.+@~-]+)+/(?=[\w.+-])", "", "".join(filter(str.isprintable, line)))[:300]


OK, WRONG, DEFECT, SKIPPED = "ok", "WRONG", "defect", "skipped"
BAD = (WRONG, FAILED)


@dataclass(frozen=True)
class Verdict:
    """status: one of those above, or the outcome's own where nothing ran. limits: what it was held to.

    reason: why, for a person; empty where there is nothing to say.
    """

    status: str
    reason: str = ""
    limits: Errors | None = None

    @property
    def is_bad(self) -> bool:
        return self.status in BAD


def judge(case: Case, outcome: Outcome, causal: Outcome | None) -> Verdict:
    """The verdict on one case. causal: FA4's causal call of the same case and build, None where it did not run.

    The causal call itself is only held to what it is off by elsewhere.
    """
    if outcome.status != RAN or outcome.errors is None:
        return Verdict(outcome.status, outcome.reason)
    if outcome.backend == CAUSAL:
        allowed = causal_limits(case.dtype)
    else:
        allowed = limits(case.dtype, causal.errors if causal is not None else None)
    why = "; ".join(_faults(outcome, outcome.errors, allowed))
    return Verdict(WRONG if why else OK, why, allowed)


def _faults(outcome: Outcome, errors: Errors, allowed: Errors) -> list[str]:
    why = []
    if outcome.bad_rows:
        why.append(f"{outcome.bad_rows} rows not written or not finite")
    # "not <=" and not ">": a NaN is wrong.
    if not errors.error <= allowed.error:
        why.append(f"error {errors.error:.2g}, {allowed.error:.2g} allowed")
    if not errors.row_error <= allowed.row_error:
        why.append(f"{outcome.row_at} is off by {errors.row_error:.2g}, {allowed.row_error:.2g} allowed")
    if not errors.lse_error <= allowed.lse_error:
        why.append(f"LSE off by {errors.lse_error:.2g}, {allowed.lse_error:.2g} allowed")
    if not outcome.repeats:
        why.append("two runs differ in bits")  # every path of the forward is deterministic
    return why


@dataclass(frozen=True)
class Agreement:
    """How a build's output compares with the first build's, on the same case and backend.

    difference: relative; None for the same bits, and where the outputs were not kept.
    """

    same_bits: bool
    difference: float | None = None

    def __str__(self) -> str:
        if self.same_bits:
            return "same bits"
        return "other bits" if self.difference is None else f"{self.difference:.1e} apart"


def compare(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> Agreement:
    """How the `(out, lse)` of two builds compare."""
    if all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True)):
        return Agreement(True)
    return Agreement(False, relative_error(one[0], other[0]))


def judge_agreement(verdict: Verdict, first: Verdict, agreement: Agreement) -> Verdict:
    """Two builds that are both right differ by no more than both limits together; other bits alone are fine."""
    if verdict.limits is None or first.limits is None or agreement.difference is None or verdict.is_bad:
        return verdict
    allowed = verdict.limits.error + first.limits.error
    if agreement.difference <= allowed:
        return verdict
    reason = f"{agreement.difference:.2g} apart from the first build, {allowed:.2g} allowed"
    return Verdict(WRONG, reason, verdict.limits)


def judge_probe(outcome: ProbeOutcome, known: Iterable[Defect], *, strict: bool) -> Verdict:
    """The verdict on a bare build. known: the defects that its source shows. strict: those fail too."""
    defect = next((own for own in known if own.name == outcome.name), None)
    error = "" if outcome.error is None else f"error {outcome.error:.2g}"
    if outcome.status == "skipped":
        return Verdict(SKIPPED, outcome.reason)
    if outcome.status == "right":
        if defect is None or defect.found_by == "run":
            return Verdict(OK)
        return Verdict(OK, "right, although its source suggests the defect")
    what = error or outcome.reason
    if defect is not None:
        return Verdict(WRONG if strict else DEFECT, f"{what}; {defect.workaround}" if what else defect.workaround)
    if outcome.status == "raised":  # loud, so nobody gets a wrong answer
        return Verdict(FAILED if strict else REFUSED, outcome.reason)
    return Verdict(WRONG, f"{error}, and nothing in its source told: this library does not know of the defect")
