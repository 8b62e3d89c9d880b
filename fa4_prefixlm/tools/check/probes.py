"""What the bare build does when it is called as an unwary engine would call it. A probe for each known defect.

Each runs in a process of its own: the key under which a build keeps a kernel is the same with and without a workaround.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from fa4_prefixlm.backends.mask_mod_call import MaskModCall
from fa4_prefixlm.batch.arguments import BatchArguments
from fa4_prefixlm.batch.tensors import describe, device_arch
from fa4_prefixlm.errors import InputError, UnsupportedError
from fa4_prefixlm.fa4.builds.defects import CAUSAL_KEPT, PAGED_LISTS, SM90_LIST_STRIDE
from fa4_prefixlm.fa4.builds.describe import MASKED_ARGUMENTS, PAGED_ARGUMENTS, Build
from fa4_prefixlm.fa4.builds.locate import installed
from fa4_prefixlm.fa4.kernels.launch import block_sparse_tensors, mask_code, on_device
from fa4_prefixlm.masks import PrefixLM
from fa4_prefixlm.runtime.plans import Plan, plan_for
from fa4_prefixlm.runtime.public_call import attention
from fa4_prefixlm.testing.accuracy import exact_attention, relative_error
from fa4_prefixlm.tools.check.judge import ProbeOutcome, in_short

# Between rounding (0.002) and what a defect does (0.1 and more).
RIGHT = 1e-2

TOKENS = 700
SPANS = (((30, 131), (200, 456), (500, 641)),)
SEQLENS = ((TOKENS,), (TOKENS,))
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class NotHereError(Exception):
    """The probe does not apply to this build or GPU."""


def probe(name: str, module: str, device: torch.device) -> ProbeOutcome:
    """Run the probe of a defect of `PROBES` on a build. Raises `InputError` if there is no such build."""
    build = installed(module)
    if build is None:
        raise InputError("build", "an importable FA4", repr(module))
    try:
        error = PROBES[name](build, device)
    except NotHereError as reason:
        return ProbeOutcome(name, "skipped", in_short(str(reason)))
    except Exception as raised:
        return ProbeOutcome(name, "raised", in_short(raised))
    return ProbeOutcome(name, "right" if error < RIGHT else "wrong", error=error)


def causal_beside_mask_mod(build: Build, device: torch.device) -> float:
    """`causal=True` together with a mask_mod: the relative error of the output."""
    _needs_arguments(build, MASKED_ARGUMENTS)
    q, k, v = _tensors(128, device)
    bounds = _plan(q, k, v, build, "reference").bounds
    cu = torch.tensor([0, TOKENS], dtype=torch.int32, device=device)
    code = mask_code("varlen" if build.varlen_mask else "packed", bounds)
    varlen = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": TOKENS, "max_seqlen_k": TOKENS}
    tensors = (q, k, v) if build.varlen_mask else (q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))
    with on_device(q):
        out, *_ = build.part("interface")._flash_attn_fwd(
            *tensors,
            softmax_scale=128**-0.5,
            causal=True,
            mask_mod=code.mask_mod(build),
            aux_tensors=code.aux_tensors,
            return_lse=True,
            **(varlen if build.varlen_mask else {}),
        )
    return _error(out.reshape(q.shape), q, k, v)


def varlen_lists_at_80_keys(build: Build, device: torch.device) -> float:
    """Varlen block lists with the 80-key tile of head dim 256, launched without the workaround: the relative
    error of the output.
    """
    _needs_sm90(device)
    q, k, v = _tensors(256, device)
    trusted = dataclasses.replace(build, sm90_list_stride="tile")
    return _error(attention(q, k, v, _plan(q, k, v, trusted, "varlen")), q, k, v)


def lists_over_pages(build: Build, device: torch.device) -> float:
    """Block lists over keys in pages as large as the key tile: the relative error of the output."""
    _needs_sm90(device)
    _needs_arguments(build, MASKED_ARGUMENTS | PAGED_ARGUMENTS)
    if not build.sm90_pages:
        raise NotHereError(f"{build} reads no pages on SM90")
    q, k, v = _tensors(128, device)
    prepared = _plan(q, k, v, build, "varlen").prepared
    assert isinstance(prepared, MaskModCall)
    assert prepared.lists is not None
    size, lists = prepared.tile.n, prepared.lists
    count = -(-TOKENS // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    caches = []
    for keys in (k, v):
        padded = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, count * size - TOKENS)).unflatten(0, (-1, size))
        caches.append(torch.empty_like(padded).index_copy_(0, order.to(device), padded))
    with on_device(q):
        out, *_ = build.part("interface")._flash_attn_fwd(
            q,
            *caches,
            cu_seqlens_q=torch.tensor([0, TOKENS], dtype=torch.int32, device=device),
            seqused_k=torch.tensor([TOKENS], dtype=torch.int32, device=device),
            page_table=order.to(device, torch.int32).unsqueeze(0),
            max_seqlen_q=TOKENS,
            max_seqlen_k=TOKENS,
            softmax_scale=128**-0.5,
            tile_mn=(prepared.tile.m, prepared.tile.n),
            mma_pv_is_rs=prepared.tile.p_in_registers,
            pack_gqa=False,
            mask_mod=prepared.code.mask_mod(build),
            aux_tensors=prepared.code.aux_tensors,
            block_sparse_tensors=block_sparse_tensors(lists, build),
            return_lse=True,
        )
    return _error(out, q, k, v)


PROBES: dict[str, Callable[[Build, torch.device], float]] = {
    CAUSAL_KEPT.name: causal_beside_mask_mod,
    SM90_LIST_STRIDE.name: varlen_lists_at_80_keys,
    PAGED_LISTS.name: lists_over_pages,
}


def _tensors(head_dim: int, device: torch.device) -> QKV:
    generator = torch.Generator().manual_seed(head_dim)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(TOKENS, heads, head_dim, generator=generator).to(torch.bfloat16).to(device)

    return normal(4), normal(2), normal(2)


def _plan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, build: Build, backend: str) -> Plan:
    try:
        return plan_for(
            describe(q, k, v),
            BatchArguments([list(own) for own in SPANS], cu_seqlens_q=[0, TOKENS], cu_seqlens_k=[0, TOKENS]),
            PrefixLM(),
            build,
            backend,
        )
    except UnsupportedError as error:
        raise NotHereError(error.expected) from error


def _error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    exact, _ = exact_attention(q, k, v, mask=PrefixLM(), spans=SPANS, seqlens=SEQLENS)
    return relative_error(out, exact)


def _needs_sm90(device: torch.device) -> None:
    if device_arch(device) // 10 != 9:
        raise NotHereError("it concerns the SM90 kernel only")


def _needs_arguments(build: Build, arguments: frozenset[str]) -> None:
    lacking = build.lacks(arguments)
    if lacking is not None:
        raise NotHereError(lacking)
