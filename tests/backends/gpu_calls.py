"""Calls on the GPU against fp64 and FA4's own causal call."""

from __future__ import annotations

import dataclasses
import random

import torch

import fa4_prefixlm as fp
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.masks import causal, key_in, prefix, window
from fa4_prefixlm.masks.base import And
from fa4_prefixlm.testing.accuracy import exact_attention
from fa4_prefixlm.testing.bands import Errors
from fa4_prefixlm.testing.batches import Batch
from fa4_prefixlm.testing.poison import nan_output, poison_free_memory
from tests.exactness import allowed, errors

MASK_MODS = ("varlen", "packed")
ONE_CALL = ("native", *MASK_MODS)
BACKENDS = (*ONE_CALL, "two_pass")
EVERY = (*BACKENDS, "flex", "reference")
BAND = 1.25
TWICE_ROUNDED_BAND = 1.5  # what is between two passes is rounded, and an output that a sink is then added to
# What FA4's causal call is off by, where it is not run on the same tensors.
TYPICAL_BAND = Errors(error=2.1e-3, row_error=0.0, lse_error=5e-5)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What decides the generated kernel."""

    dims: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    heads: tuple[int, int] = (4, 2)
    softcap: float = 0.0
    sink: bool = False

    def __str__(self) -> str:
        extras = f"{'-softcap' if self.softcap else ''}{'-sink' if self.sink else ''}"
        return f"{self.dims[0]}x{self.dims[1]}-{str(self.dtype)[6:]}-{self.heads[0]}/{self.heads[1]}{extras}"


def times_causal(backend: str, kind: Kind) -> float:
    """The error that a backend may have, in those of FA4's causal kernel on the same data."""
    return TWICE_ROUNDED_BAND if backend == "two_pass" or (backend == "flex" and kind.sink) else BAND


def tensors_of(kind: Kind, batch: Batch, seed: int):
    q, k, v = batch.tensors(kind.heads, kind.dims, kind.dtype, "cuda", seed)
    sink = torch.randn(kind.heads[0], device="cuda") if kind.sink else None
    return q, k, v, Options(kind.dims[0] ** -0.5, kind.softcap, sink)


def causal_band(q, k, v, batch: Batch, window: int | None, options: Options) -> Errors:
    """What FA4's own causal kernel is off by on these very tensors.

    With and without the window, whichever errs more: where rows see one key, they have no rounding to compare with.
    """
    band = _causal_errors(q, k, v, batch, None, options)
    if window is None:
        return band
    other = _causal_errors(q, k, v, batch, window, options)
    return Errors(*map(max, dataclasses.astuple(band), dataclasses.astuple(other)))


def _causal_errors(q, k, v, batch: Batch, window: int | None, options: Options) -> Errors:
    from fa4_prefixlm.batch.keys import Keys
    from fa4_prefixlm.fa4.builds.locate import installed
    from fa4_prefixlm.fa4.kernels.launch import causal_forward

    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32, device="cuda") for cu in (batch.cu_q, batch.cu_k))
    longest_q, longest_k = (max(sizes) for sizes in batch.as_seqlens)
    out, lse = causal_forward(
        q,
        k,
        v,
        build=installed(),
        cu_seqlens_q=cu_q,
        max_seqlen_q=longest_q,
        keys=Keys(longest_k, cu_seqlens_k=cu_k),
        window=window,
        options=options,
    )
    nothing = tuple(() for _ in batch.spans)
    exact, exact_lse = exact_attention(
        q, k, v, mask=fp.PrefixLM(window), spans=nothing, seqlens=batch.as_seqlens, options=options
    )
    return errors(out, exact, lse, exact_lse)


def run(
    kind: Kind, batch: Batch, mask, backend: str, seed: int, device_inputs: bool = False, page_size: int | None = None
) -> Errors:
    """One attention call against fp64: every element written, twice the same bits, and what it is off by."""
    q, k, v, options = tensors_of(kind, batch, seed)
    exact, exact_lse = exact_attention(q, k, v, mask=mask, spans=batch.spans, seqlens=batch.as_seqlens, options=options)
    cu_q, cu_k, ranges = batch.cu_q, batch.cu_k, [list(own) for own in batch.spans]
    if device_inputs:
        cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32, device="cuda") for cu in (cu_q, cu_k))
        ranges = batch.ranges_tensor().cuda()
    where = {"cu_seqlens_k": cu_k}
    if page_size is not None:
        pages = batch.in_pages(k, v, page_size, seed)
        k, v = pages.k, pages.v
        used = torch.tensor(batch.as_seqlens[1], dtype=torch.int32)
        where = {"page_table": pages.table.cuda(), "seqused_k": used.cuda() if device_inputs else used}
    poison_free_memory()
    plan = fp.plan(ranges, like=(q, k, v), cu_seqlens_q=cu_q, mask=mask, backend=backend, **where)
    results = []
    for _ in range(2):
        poison_free_memory()
        out = nan_output(q, v.shape[-1])
        same, lse = fp.attention(
            q, k, v, plan, out=out, return_lse=True, softcap=kind.softcap, learnable_sink=options.learnable_sink
        )
        assert same.data_ptr() == out.data_ptr()
        results.append((out, lse))
    assert torch.equal(results[0][0], results[1][0]), "two runs differ"
    assert torch.equal(results[0][1], results[1][1]), "two runs differ in the LSE"
    out, lse = results[0]
    assert torch.equal(lse == float("-inf"), exact_lse == float("-inf")), "LSE of rows that see nothing"
    assert not torch.isnan(out).any(), "an element was not written, or is NaN"
    return errors(out, exact, lse, exact_lse)


def limit(backend: str, kind: Kind, band: Errors, at_least: float = 0.0) -> Errors:
    """What a backend is held to where FA4's causal call is off by `band`. at_least: a limit for the whole output."""
    return allowed(kind.dtype, band, error=max(times_causal(backend, kind) * band.error + 1e-6, at_least))


def measured(found: Errors, band: Errors) -> dict[str, float]:
    """For `--gpu-report`."""
    return {
        "error": found.error,
        "band": band.error,
        "row_error": found.row_error,
        "row_band": band.row_error,
        "lse_error": found.lse_error,
        "lse_band": band.lse_error,
    }


MANY = causal & (window(60) | key_in("image") | prefix("prompt"))


class Somebodys(And):
    """Another's class, which may say anything: on `flex` its rows' intervals tell, and never its rule."""


OWN = Somebodys(causal, window(60) | key_in("image") | prefix("prompt"))


def many_spans(rng: random.Random, batch: Batch, most: int) -> dict[str, list]:
    """Up to `most` small images in each sequence, and a prompt: `most + 2` intervals a row."""
    named: dict[str, list] = {"image": [], "prompt": []}
    for _, keys in batch.seqlens:
        starts = sorted(rng.sample(range(0, keys, 12), k=min(most, -(-keys // 12))))
        named["image"].append([(at, min(at + rng.randint(1, 11), keys)) for at in starts])
        named["prompt"].append([(0, rng.randint(1, keys))] if keys else [])
    return named
