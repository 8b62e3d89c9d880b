"""Run one case on one backend of one build in this process, or time it on several: numbers, no verdict."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.errors import UnsupportedError
from fa4_prefixlm.runtime.plans import Plan, plan
from fa4_prefixlm.runtime.public_call import attention
from fa4_prefixlm.testing.accuracy import exact_attention, relative_error
from fa4_prefixlm.testing.bands import largest_lse_error, row_errors
from fa4_prefixlm.testing.poison import nan_output, poison_free_memory
from fa4_prefixlm.testing.timing import time_in_rounds
from fa4_prefixlm.tools.check.cases import Case, Inputs, inputs
from fa4_prefixlm.tools.check.judge import CAUSAL, FAILED, RAN, REFUSED, Outcome, Speed, in_short

ROUNDS = 7
ROUND_MS = 25.0


def run_case(
    case: Case, backend: str, build: str | None, device: torch.device, save: pathlib.Path | None = None
) -> Outcome:
    """The outcome of a case; errors become an outcome too.

    build: the FA4's module, None where there is none. save: where to keep `(out, lse)` for a comparison of builds.
    """
    began = time.monotonic()
    try:
        outcome = _run(case, backend, build, device, save)
    except UnsupportedError as error:
        outcome = Outcome(case.name, backend, REFUSED, _refusal(error))
    except Exception as error:
        outcome = Outcome(case.name, backend, FAILED, in_short(error))
    return dataclasses.replace(outcome, seconds=round(time.monotonic() - began, 3))


def _run(case: Case, backend: str, build: str | None, device: torch.device, save: pathlib.Path | None) -> Outcome:
    ready = plan_case(case, backend, build, device)
    (out, lse), (again, again_lse) = (_attend_poisoned(case, ready, device) for _ in range(2))
    exact, exact_lse = _exact(case, backend == CAUSAL, device)
    rows = row_errors(out, exact)
    worst = int(rows.argmax()) if rows.numel() else 0
    if save is not None:
        torch.save((out.cpu(), lse.cpu()), save)
    return Outcome(
        case=case.name,
        backend=backend,
        status=RAN,
        error=relative_error(out, exact),
        row_error=float(rows.flatten()[worst]) if rows.numel() else 0.0,
        row_at=_where(case, worst // rows.shape[1], worst % rows.shape[1]) if rows.numel() else "",
        lse_error=largest_lse_error(lse, exact_lse),
        bad_rows=int(out.isfinite().all(2).all(1).logical_not().sum()),
        repeats=_same_bits(out, again) and _same_bits(lse, again_lse),
        digest=_digest(out, lse),
        kernel=dict(ready.prepared.describe()).get("kernel", ""),
    )


def plan_case(case: Case, backend: str, build: str | None, device: torch.device) -> Plan:
    """The plan of a case. `CAUSAL` runs it without its spans; where there is no GPU, the reference stands in for it.

    Raises `UnsupportedError` if the backend can't run the case.
    """
    given = _inputs(case, device)
    keys, values = given.cache or (given.k, given.v)
    where: dict[str, Any] = {"cu_seqlens_k": case.cu_seqlens_k}
    if case.page_size is not None:
        where = {"page_table": given.table, "seqused_k": list(case.seqlens_k)}
    stands_in = backend == CAUSAL and device.type != "cuda"
    return plan(
        [list(own) for own in (case.no_spans if backend == CAUSAL else case.spans)],
        like=(given.q, keys, values),
        cu_seqlens_q=case.cu_seqlens_q,
        mask=case.causal_mask if backend == CAUSAL else case.attention_mask,
        backend="reference" if stands_in else backend,
        build=build,
        **where,
    )


def time_case(case: Case, backends: Sequence[str], build: str | None, device: torch.device) -> list[Speed]:
    """The speeds of backends that were found right, in turns with `CAUSAL`, which comes first.

    Their kernels should be compiled already.
    """
    plans = {name: plan_case(case, name, build, device) for name in dict.fromkeys([CAUSAL, *backends])}

    def call(name: str) -> Callable[[], object]:
        return lambda: attend(case, plans[name], device)

    timings = time_in_rounds({name: call(name) for name in plans}, rounds=ROUNDS, round_ms=ROUND_MS)
    tflops = {name: plans[name].flops() / own.ms / 1e9 for name, own in timings.items()}
    return [
        Speed(case.name, name, own.ms, tflops[name], tflops[name] / tflops[CAUSAL], own.spread)
        for name, own in timings.items()
    ]


@functools.lru_cache(maxsize=1)
def _inputs(case: Case, device: torch.device) -> Inputs:
    return inputs(case, device)


@functools.lru_cache(maxsize=2)
def _exact(case: Case, causal: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    given = _inputs(case, device)
    return exact_attention(
        given.q,
        given.k,
        given.v,
        mask=case.causal_mask if causal else case.attention_mask,
        spans=case.no_spans if causal else case.spans,
        seqlens=case.seqlens,
        options=Options(case.head_dim**-0.5, case.softcap, given.sink),
    )


def attend(
    case: Case, ready: Plan, device: torch.device, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, lse)` of the case by a plan for it."""
    given = _inputs(case, device)
    keys, values = given.cache or (given.k, given.v)
    return attention(
        given.q, keys, values, ready, out=out, return_lse=True, softcap=case.softcap, learnable_sink=given.sink
    )


def _attend_poisoned(case: Case, ready: Plan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, where memory that nobody wrote holds NaN."""
    out = nan_output(_inputs(case, device).q, case.head_dim_v)
    poison_free_memory(device)
    return attend(case, ready, device, out)


def _where(case: Case, row: int, head: int) -> str:
    """The token of a row of the packed queries: "sequence 2, position 129, head 1"."""
    for index, (length, keys) in enumerate(zip(*case.seqlens, strict=True)):
        if row < length:
            return f"sequence {index}, position {row + keys - length}, head {head}"
        row -= length
    raise AssertionError("a row past the batch")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        held = tensor.cpu().contiguous()
        digest.update(ctypes.string_at(held.data_ptr(), held.nbytes))
    return digest.hexdigest()


def _refusal(error: UnsupportedError) -> str:
    """Why, without the words that every refusal begins with."""
    return in_short(error.expected.removeprefix("a backend that can run this call (").removesuffix(")"))
