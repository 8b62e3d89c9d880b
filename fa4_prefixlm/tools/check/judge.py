"""Numbers -> verdicts. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fa4_prefixlm.fa4.build.defects import Defect
from fa4_prefixlm.testing.accuracy import relative_error
from fa4_prefixlm.tools.check.cases import Case
from fa4_prefixlm.tools.check.outcomes import CAUSAL, FAILED, RAN, REFUSED, Outcome, ProbeOutcome

OK, WRONG, DEFECT, SKIPPED = "ok", "WRONG", "defect", "skipped"
BAD = (WRONG, FAILED)


@dataclass(frozen=True)
class Verdict:
    """status: one of those above, or the outcome's own where nothing ran. limits: what it was held to.

    reason: why, for a person; empty where there is nothing to say.
    """

    status: str
    reason: str = ""
    limits: Limits | None = None

    @property
    def is_bad(self) -> bool:
        return self.status in BAD


@dataclass(frozen=True)
class Limits:
    """The largest relative error of an output, of one token and head of it, and the largest error of an LSE."""

    error: float
    row_error: float
    lse_error: float


# What FA4's kernels are off by on an H200, from above (benchmarks/results/h200-exactness.json, thousands of calls):
# output 1.6e-3 to 2.4e-3 in bfloat16 and an eighth of it in float16 (3 bits more), LSE up to 2.1e-5, softcap or not.
# A row of one token and head has few elements to average over: rounding P and the output cost up to 2e-3 each.
TYPICAL = {
    "bfloat16": Limits(error=2e-3, row_error=4e-3, lse_error=1e-4),
    "float16": Limits(error=2.5e-4, row_error=5e-4, lse_error=1e-4),
}
# A path may round once more than the causal call (two passes do), and has other rows that are the worst. A wrong key is
# far outside: one of n keys missing moves its row by about 1/sqrt(n), 0.03 at 1000 keys, and its LSE by 1/n.
SLACK = Limits(error=1.5, row_error=2.0, lse_error=2.0)
# A causal call that is off by more than so many times that is no band for anything, but wrong itself.
WORST_CAUSAL = 4.0


def judge(case: Case, outcome: Outcome, causal: Outcome | None) -> Verdict:
    """The verdict on one case. causal: FA4's causal call of the same case and build, None where it did not run.

    The causal call itself is only held to what it is off by elsewhere.
    """
    if outcome.status != RAN:
        return Verdict(outcome.status, outcome.reason)
    limits = _widest(case) if outcome.backend == CAUSAL else _limits(case, causal)
    why = "; ".join(_faults(outcome, limits))
    return Verdict(WRONG if why else OK, why, limits)


def _faults(outcome: Outcome, limits: Limits) -> list[str]:
    why = []
    if outcome.bad_rows:
        why.append(f"{outcome.bad_rows} rows not written or not finite")
    # "not <=" and not ">": a NaN is wrong.
    if not _or_0(outcome.error) <= limits.error:
        why.append(f"error {outcome.error:.2g}, {limits.error:.2g} allowed")
    if not _or_0(outcome.row_error) <= limits.row_error:
        why.append(f"{outcome.row_at} is off by {outcome.row_error:.2g}, {limits.row_error:.2g} allowed")
    if not _or_0(outcome.lse_error) <= limits.lse_error:
        why.append(f"LSE off by {outcome.lse_error:.2g}, {limits.lse_error:.2g} allowed")
    if not outcome.repeats:
        why.append("two runs differ in bits")  # every path of the forward is deterministic
    return why


def _limits(case: Case, causal: Outcome | None) -> Limits:
    """Some slack on what the causal call is off by, which is taken as typical where it is less or unknown."""
    typical = TYPICAL[case.dtype]
    if causal is None:
        causal = Outcome("", CAUSAL, REFUSED)

    def limit(measured: float | None, usual: float, slack: float) -> float:
        if measured is None or not measured >= usual:
            return slack * usual
        return slack * min(measured, WORST_CAUSAL * usual)

    return Limits(
        error=limit(causal.error, typical.error, SLACK.error),
        row_error=limit(causal.row_error, typical.row_error, SLACK.row_error),
        lse_error=limit(causal.lse_error, typical.lse_error, SLACK.lse_error),
    )


def _widest(case: Case) -> Limits:
    typical = TYPICAL[case.dtype]
    return Limits(*(WORST_CAUSAL * value for value in (typical.error, typical.row_error, typical.lse_error)))


def _or_0(value: float | None) -> float:
    return 0.0 if value is None else value


@dataclass(frozen=True)
class Agreement:
    """Of a build with the first one on the same case and backend. difference: relative, None for the same bits."""

    same_bits: bool
    difference: float | None = None

    def __str__(self) -> str:
        if self.same_bits:
            return "same bits"
        return "other bits" if self.difference is None else f"{self.difference:.1e} apart"


def compare(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> Agreement:
    """Of `(out, lse)` of two builds."""
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
    """known: the defects that the build's source has. strict: those fail too."""
    defect = next((own for own in known if own.name == outcome.name), None)
    error = "" if outcome.error is None else f"error {outcome.error:.2g}"
    if outcome.status == "skipped":
        return Verdict(SKIPPED, outcome.reason)
    if outcome.status == "right":
        if defect is None or defect.found_by == "run":
            return Verdict(OK)
        return Verdict(OK, "right, though its source looks as if it were not")
    what = error or outcome.reason
    if defect is not None:
        return Verdict(WRONG if strict else DEFECT, f"{what}; {defect.workaround}" if what else defect.workaround)
    if outcome.status == "raised":  # loud, so nobody gets a wrong answer
        return Verdict(FAILED if strict else REFUSED, outcome.reason)
    return Verdict(WRONG, f"{error}, and its source does not tell: this library does not know of it")
