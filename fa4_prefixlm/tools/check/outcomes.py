"""What was measured, before anyone judges it. Values that cross process borders as JSON."""

from __future__ import annotations

import re
from dataclasses import dataclass

# FA4's own causal call on the tensors of a case, without its spans: a path like any other, and the peer of the others.
CAUSAL = "causal"

RAN, COMPILED, REFUSED, FAILED = "ran", "compiled", "refused", "failed"


@dataclass(frozen=True)
class Outcome:
    """One case on one backend of one build.

    status: `RAN`, `COMPILED` (not run), `REFUSED` (the backend's own refusal) or `FAILED`. reason: of the latter two.
    error: relative error of the output against float64. row_error: the largest of a single token and head, `row_at`
        says where. lse_error: the largest absolute one. Each is NaN or infinite where the output is.
    bad_rows: tokens with an element that is not finite, which is also what one looks like that was never written.
    repeats: a second run gave the same bits. digest: of output and LSE. kernel: what ran, in the plan's words.
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


@dataclass(frozen=True)
class Speed:
    """ms: of one call. of_causal: its exact TFLOP/s over those of FA4's causal call, measured in turns with it."""

    case: str
    backend: str
    ms: float
    tflops: float
    of_causal: float
    spread: float


@dataclass(frozen=True)
class ProbeOutcome:
    """What the bare build did. status: "right", "wrong", "raised" or "skipped"; reason: of the latter two."""

    name: str
    status: str
    reason: str = ""
    error: float | None = None


def in_short(error: BaseException | str) -> str:
    """An error as one line without the folders of this machine: what a report that others read may hold."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # compilers colour their messages
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"(?<![\w.])(?:/[\w.+@~-]+)+/(?=[\w.+-])", "", "".join(filter(str.isprintable, line)))[:300]
