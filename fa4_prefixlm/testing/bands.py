"""What an output may be off by: errors as a whole and row by row, and limits made of FA4's own causal call.

A kernel that is right is off by rounding, about as much as FA4's causal call on the same tensors: its band. A wrong key
is far outside: one of n keys missing moves its row by about 1/sqrt(n), 0.03 at 1000 keys, and its LSE by 1/n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fa4_prefixlm.testing.accuracy import relative_error


@dataclass(frozen=True)
class Errors:
    """Errors against float64, as measured or as allowed. NaN or infinite where the output is.

    Attributes:
        error: Relative error of the whole output.
        row_error: The largest relative error of one token and head.
        lse_error: The largest absolute error of an LSE.
    """

    error: float
    row_error: float
    lse_error: float

    def __mul__(self, by: float) -> Errors:
        return Errors(self.error * by, self.row_error * by, self.lse_error * by)


# What FA4's kernels are off by on an H200, from above (benchmarks/results/h200-exactness.json, thousands of calls):
# output 1.6e-3 to 2.4e-3 in bfloat16 and an eighth of it in float16 (3 bits more), LSE up to 2.1e-5, softcap or not.
# A row of one token and head has few elements to average over: rounding P and the output cost up to 2e-3 each.
TYPICAL = {
    "bfloat16": Errors(error=2e-3, row_error=4e-3, lse_error=1e-4),
    "float16": Errors(error=2.5e-4, row_error=5e-4, lse_error=1e-4),
}
# A path may round once more than the causal call (two passes do), and has other rows that are the worst.
SLACK = Errors(error=1.5, row_error=2.0, lse_error=2.0)
# A causal call that is off by more than so many times that is no band for anything, but wrong itself.
WORST_CAUSAL = 4.0


def limits(dtype: str, causal: Errors | None) -> Errors:
    """What a path is held to, on tensors of a dtype ("bfloat16", "float16").

    Some slack on what the causal call is off by, which is taken as typical where it is less (a batch of one token has
    no error) or unknown, and as the widest that makes a band where it is more.
    """
    typical, widest = TYPICAL[dtype], causal_limits(dtype)
    measured = causal or typical

    def limit(own: float, usual: float, most: float, slack: float) -> float:
        return slack * (min(own, most) if own >= usual else usual)  # a NaN is not >=

    return Errors(
        limit(measured.error, typical.error, widest.error, SLACK.error),
        limit(measured.row_error, typical.row_error, widest.row_error, SLACK.row_error),
        limit(measured.lse_error, typical.lse_error, widest.lse_error, SLACK.lse_error),
    )


def causal_limits(dtype: str) -> Errors:
    """What the causal call itself is held to."""
    return TYPICAL[dtype] * WORST_CAUSAL


def errors_of(out: torch.Tensor, lse: torch.Tensor, exact: torch.Tensor, exact_lse: torch.Tensor) -> Errors:
    """The errors of an output `(total_q, heads, head_dim)` and its LSE `(heads, total_q)` against float64."""
    rows = row_errors(out, exact)
    return Errors(
        relative_error(out, exact), float(rows.max()) if rows.numel() else 0.0, largest_lse_error(lse, exact_lse)
    )


def row_errors(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Relative error of each token and head, `(total_q, heads)` float64: infinite where it is not finite, and where
    only the exact row is 0.
    """
    difference = torch.linalg.vector_norm(out.double() - exact, dim=2)
    norm = torch.linalg.vector_norm(exact, dim=2)
    nothing = torch.where(difference == 0, 0.0, math.inf)
    return torch.where(norm == 0, nothing, difference / norm).nan_to_num(nan=math.inf, posinf=math.inf)


def largest_lse_error(lse: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error; infinite where one is not finite, or only one of the two is -inf (a row sees nothing)."""
    if lse.numel() == 0:
        return 0.0
    both = (lse == -math.inf) & (exact == -math.inf)
    return float((lse.double() - exact).abs().masked_fill(both, 0.0).nan_to_num(nan=math.inf, posinf=math.inf).max())
