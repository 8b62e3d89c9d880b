"""What an output is held to: the whole, each row of one token and head, and each LSE.

One row of thousands that is wrong moves the error of the whole by less than rounding does.
"""

from __future__ import annotations

import torch

from fa4_prefixlm.testing.bands import Errors, errors_of, limits, row_errors

# Of the whole output, where there is no causal call on the same tensors to compare with.
WHOLE = {torch.bfloat16: 2.6e-3, torch.float16: 3.2e-4}


def errors(
    out: torch.Tensor, exact: torch.Tensor, lse: torch.Tensor | None = None, exact_lse: torch.Tensor | None = None
) -> Errors:
    """Errors against float64; that of the LSE is 0 where a call gives none."""
    if lse is None or exact_lse is None:
        lse = exact_lse = torch.zeros(0)
    return errors_of(out, lse, exact, exact_lse)


def allowed(dtype: torch.dtype, causal: Errors | None = None, *, error: float | None = None) -> Errors:
    """Limits for an output of a dtype.

    causal: what FA4's causal call is off by on the same tensors, None where it is not run.
    error: the limit for the whole output.
    """
    rows = limits(str(dtype).removeprefix("torch."), causal).row_error
    lse_error = max(2 * causal.lse_error, 1e-4) if causal is not None else 1e-4
    return Errors(WHOLE[dtype] if error is None else error, rows, lse_error)


def assert_within(found: Errors, limit: Errors, context: str = "") -> None:
    """Raises `AssertionError` with everything that is too large."""
    wrong = [
        f"{name} {own:.3g}, {most:.3g} allowed"
        for name, own, most in (
            ("error of the output", found.error, limit.error),
            ("error of a row", found.row_error, limit.row_error),
            ("error of an LSE", found.lse_error, limit.lse_error),
        )
        if not own <= most  # a NaN is wrong
    ]
    assert not wrong, "; ".join([*wrong, context])


def assert_exact(
    out: torch.Tensor,
    exact: torch.Tensor,
    lse: torch.Tensor | None = None,
    exact_lse: torch.Tensor | None = None,
    *,
    error: float | None = None,
    context: str = "",
) -> None:
    """The output of one call, on tensors of ordinary size, by limits that need no other call."""
    worst = row_errors(out, exact)
    where = f"row {int(worst.argmax()) // worst.shape[1]} is the worst" if worst.numel() else ""
    assert_within(errors(out, exact, lse, exact_lse), allowed(out.dtype, error=error), f"{where} {context}")
