"""Compile and launch the native backward: FA4's preprocess, the kernel of `native_backward`, FA4's postprocess."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from fa4_prefixlm.batch.forward_pass import ForwardPass, Grads
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.device_checks import is_capturing
from fa4_prefixlm.errors import UnsupportedError
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.fa4.kernels.backward_tiles import BackwardTile
from fa4_prefixlm.fa4.kernels.launch import PADDING, on_device
from fa4_prefixlm.geometry.key_bounds import KeyBounds

ARCH = 90


@dataclasses.dataclass(frozen=True)
class KeyTables:
    """What the kernel reads of a plan, see `native_backward.key_intervals`.

    order: of writes to dQ; None: any, so that sums differ in their last bits from run to run.
    """

    bounds: torch.Tensor
    tiles: torch.Tensor
    intervals: int
    order: torch.Tensor | None = None

    @classmethod
    def of(cls, keys: KeyBounds, tiles: torch.Tensor, order: torch.Tensor | None) -> KeyTables:
        """The tables; a thread reads the bounds of all keys of its key tile, also past the last one."""
        flat = torch.stack([keys.begin, keys.end], dim=2).flatten(1)
        return cls(torch.nn.functional.pad(flat, (0, 0, 0, PADDING)), tiles, keys.count, order)

    def nbytes(self) -> int:
        return sum(own.nbytes for own in (self.bounds, self.tiles, self.order) if own is not None)


def native_backward(
    forward: ForwardPass,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    *,
    build: Build,
    tile: BackwardTile,
    tables: KeyTables,
    lengths: Lengths,
    options: Options,
) -> Grads:
    """`(dq, dk, dv)` of packed tensors.

    The stream must have made `tables` before: the kernel reads them before it waits for the preprocess (PDL).
    """
    parts = _parts(build)
    q, k, v, out, lse = forward
    q, k, v, out, dout = (parts.contiguous(tensor.detach()) for tensor in (q, k, v, out, dout))
    lse = parts.contiguous(lse)
    with on_device(q):
        room = _Room.allocate(parts, q, k, v, tile, lengths, deterministic=tables.order is not None)
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        key_grads = grads[1:] if room.dk is None or room.dv is None else (room.dk, room.dv)
        common = {"fake_mode": parts.is_fake(), "hdim_multiple_of": tile.head_dim_multiple}
        dtype, widths = parts.dtypes[q.dtype], (q.shape[-1], v.shape[-1])
        parts.preprocess(
            *(out, dout, room.dpsum, lse, room.lse_log2, room.dq, lengths.cu_seqlens_q, None),
            *(None if dlse is None else parts.contiguous(dlse), dtype, *widths, tile.m),
            cu_total_m_blocks=room.tiles_q,
            **common,
        )
        by_rows, by_heads = _by_key_head(k.shape[-2]) if tile.fold else (_same, _same)
        tensors = {
            "mQ": by_rows(q),
            "mK": k,
            "mV": v,
            "mdO": by_rows(dout),
            "mLSE": by_heads(room.lse_log2),
            "mdPsum": by_heads(room.dpsum),
            "mdQaccum": by_heads(room.dq),
            "mdK": key_grads[0],
            "mdV": key_grads[1],
            "softmax_scale": options.softmax_scale,
            "mCuSeqlensQ": lengths.cu_seqlens_q,
            "mCuSeqlensK": lengths.cu_seqlens_k,
            "mdQ_semaphore": room.turns_q,
            "mdK_semaphore": room.turns_k,
            "mdV_semaphore": room.turns_v,
            "mCuTotalMBlocks": room.tiles_k,
        }
        run = _kernel(parts, tile, options.softcap, tensors, tables)
        if not parts.is_fake():
            lists = (tables.bounds, tables.tiles, tables.order, *parts.no_lists)
            run(*parts.arguments(tensors, lists))
        threads = tile.warp_groups * 128
        _, atoms_kv, atoms_q = tile.atoms
        parts.postprocess(
            *(room.dq, grads[0], options.softmax_scale, lengths.cu_seqlens_q, None, ARCH, dtype, widths[0], tile.m),
            *(128 if tile.dq_by_one else threads, atoms_q, False),
            cu_total_m_blocks=room.tiles_q,
            **common,
        )
        if room.dk is not None:
            scales = (options.softmax_scale, 1.0)
            for sums, grad, scale, width in zip((room.dk, room.dv), grads[1:], scales, widths, strict=True):
                parts.postprocess(
                    *(sums, grad, scale, lengths.cu_seqlens_k, None, ARCH, dtype, width, tile.n),
                    *(threads, atoms_kv, tile.swap_dkv),
                    cu_total_m_blocks=room.tiles_k,
                    **common,
                )
    return grads


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _by_key_head(
    heads_kv: int,
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Views `(query heads a key head, rows, key heads, dim)`, which FA4 takes for a batch, and with heads first."""
    return (
        lambda rows: rows.unflatten(1, (heads_kv, -1)).permute(2, 0, 1, 3),
        lambda sums: sums.unflatten(0, (heads_kv, -1)).transpose(0, 1),
    )


@dataclasses.dataclass(frozen=True)
class _Room:
    """Memory of one call.

    Attributes:
        dq: float32 sums `(heads, rows * head_dim)`, rows rounded up to tiles sequence by sequence.
        dpsum, lse_log2: `(heads, rows)` float32.
        dk, dv: float32 sums by key head, where several query heads add to one; else None.
        turns_q, turns_k, turns_v: counters of the deterministic order.
        tiles_q, tiles_k: tiles up to each sequence, where there are many.
    """

    dq: torch.Tensor
    dpsum: torch.Tensor
    lse_log2: torch.Tensor
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    turns_q: torch.Tensor | None = None
    turns_k: torch.Tensor | None = None
    turns_v: torch.Tensor | None = None
    tiles_q: torch.Tensor | None = None
    tiles_k: torch.Tensor | None = None

    @classmethod
    def allocate(
        cls,
        parts: _BuildParts,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tile: BackwardTile,
        lengths: Lengths,
        *,
        deterministic: bool,
    ) -> _Room:
        heads, heads_kv, batch, device = q.shape[-2], k.shape[-2], lengths.batch, q.device
        width, width_v = (_up(own.shape[-1], tile.head_dim_multiple) for own in (q, v))
        rows = _up(lengths.total_q + batch * tile.m, tile.m)
        keys = _up(lengths.total_k + batch * tile.n, tile.n)

        def sums(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=device)

        def counters(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        found: dict[str, torch.Tensor] = {}
        if heads > heads_kv and not tile.fold:
            found["dk"], found["dv"] = sums(heads_kv, keys * width).zero_(), sums(heads_kv, keys * width_v).zero_()
        if deterministic:
            found["turns_q"] = counters(batch, heads, -(-lengths.max_seqlen_q // tile.m), 1)
            if heads > heads_kv:
                shape = batch, heads_kv, -(-lengths.max_seqlen_k // tile.n), 2
                found["turns_k"], found["turns_v"] = counters(*shape), counters(*shape)
        if batch > parts.many_sequences:
            for name, own, size in (("q", lengths.cu_seqlens_q, tile.m), ("k", lengths.cu_seqlens_k, tile.n)):
                found[f"tiles_{name}"], _ = parts.tile_cumsum(cu_seqlens=own, seqused=None, tile_size=size)
        return cls(sums(heads, rows * width), sums(heads, rows), sums(heads, rows), **found)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _kernel(parts: _BuildParts, tile: BackwardTile, softcap: float, tensors: dict[str, Any], tables: KeyTables) -> Any:
    q, k, v = tensors["mQ"], tensors["mK"], tensors["mV"]
    turns = [tensors[f"md{name}_semaphore"] for name in "QKV"]
    key = (
        tile,
        softcap,
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        q.shape[-2] // k.shape[-2],
        q.shape[0] if tile.fold else 1,
        tables.intervals,
        0 if tables.order is None else tables.order.ndim,
        tensors["mCuTotalMBlocks"] is None,
        tuple(own is not None and own.shape[2] == 1 for own in turns),  # a dimension of 1 has a stride of its own
        tuple(parts.broadcast(tensors[name]) for name in ("mQ", "mK", "mV", "mdO")),
    )
    run = parts.compiled.get(key)
    if run is not None:
        return run
    if is_capturing():
        expected = "one backward before the capture, to compile the kernel"
        raise UnsupportedError("q, k, v", expected, f"a first one, tile {tile}")
    named = (_own_source(), repr(key))
    if parts.disk is not None and named in parts.disk:
        run = parts.disk[named]
    else:
        run = _compile(parts, tile, softcap, tensors, tables)
        if parts.disk is not None:
            parts.disk[named] = run
    parts.compiled[key] = run
    return run


def _compile(parts: _BuildParts, tile: BackwardTile, softcap: float, tensors: dict[str, Any], tables: KeyTables) -> Any:
    from cutlass import cute

    from fa4_prefixlm.fa4.kernels.native_backward import kernel_class, key_intervals

    q, k, v = tensors["mQ"], tensors["mK"], tensors["mV"]
    backward = kernel_class(parts.module, tile.step)(
        parts.dtypes[q.dtype],
        q.shape[-1],
        v.shape[-1],
        q.shape[-2] // k.shape[-2],
        False,
        is_local=True,  # FA4 then asks whether a key tile visits any query tile, and takes its longest-first order
        deterministic=tables.order is not None,
        tile_m=tile.m,
        tile_n=tile.n,
        Q_stage=tile.stages_q,
        dO_stage=tile.stages_do,
        PdS_stage=tile.stages_pds,
        SdP_swapAB=tile.swap_sdp,
        dKV_swapAB=tile.swap_dkv,
        dQ_swapAB=False,
        AtomLayoutMSdP=tile.atoms[0],
        AtomLayoutNdKV=tile.atoms[1],
        AtomLayoutMdQ=tile.atoms[2],
        num_threads=(tile.warp_groups + 1) * 128,
        V_in_regs=False,
        score_mod=parts.softcap(softcap) if softcap else None,
        score_mod_bwd=parts.softcap_backward(softcap) if softcap else None,
        mask_mod=None,
        has_aux_tensors=False,
        dQ_single_wg=tile.dq_by_one,
        intervals=tables.intervals,
        skip_full=tile.skip_full,
        by_heads=tile.by_heads,
        softcap=softcap,
        folded=q.shape[0] if tile.fold else 1,
    )

    def describe(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if name.endswith("semaphore"):
            return parts.describe(value, assumed_align=4, leading_dim=3)
        return parts.describe(value, assumed_align=4) if name.startswith("mCu") else parts.describe(value)

    order = None if tables.order is None else parts.describe(tables.order, assumed_align=4)
    bounds, tiles = parts.describe(tables.bounds, assumed_align=8), parts.describe(tables.tiles, assumed_align=16)
    lists = key_intervals(parts.module, bounds, tiles, order)
    described = {name: describe(name, value) for name, value in tensors.items()}
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(backward, *parts.arguments(described, lists), stream, options="--enable-tvm-ffi")


class _BuildParts:
    """What of a build the launch uses, looked up once."""

    def __init__(self, build: Build) -> None:
        interface, utils, tools = build.part("interface"), build.part("cute_dsl_utils"), build.part("utils")
        call = build.part("flash_bwd_sm90").FlashAttentionBackwardSm90.__call__
        self.module = build.module
        self.names = [name for name in inspect.signature(call).parameters if name not in ("self", "stream")]
        self.defaults = {"aux_data": tools.AuxData()}
        self.no_lists = (None,) * (len(build.part("block_sparsity").BlockSparseTensors._fields) - 3)
        self.preprocess, self.postprocess = interface._bwd_preprocess, interface._bwd_postprocess_convert
        self.tile_cumsum, self.many_sequences = interface._compute_tile_cumsum, interface.BIN_BATCH_SEARCH_THRESH
        self.contiguous, self.broadcast = utils.maybe_contiguous, utils.get_broadcast_dims
        self.describe, self.dtypes = utils.to_cute_tensor, utils.torch2cute_dtype_map
        self.softcap, self.softcap_backward = tools.create_softcap_scoremod, tools.create_softcap_scoremod_bwd
        self.is_fake = build.part("testing").is_fake_mode
        self.compiled: dict[object, Any] = {}
        caches = build.part("cache_utils")
        self.disk = caches.get_jit_cache("fa4_prefixlm_backward") if caches.CUTE_DSL_CACHE_ENABLED else None

    def arguments(self, values: dict[str, Any], lists: Any) -> list[Any]:
        """In the order of the build's `FlashAttentionBackwardSm90.__call__`."""
        given = {**self.defaults, **values, "blocksparse_tensors": lists}
        return [given.get(name) for name in self.names]


@functools.cache
def _parts(build: Build) -> _BuildParts:
    return _BuildParts(build)


@functools.cache
def _own_source() -> str:
    own = ("native", "native_backward", "folded_heads", "ordered_sums", "backward_step_256", "native_backward_launch")
    files = (pathlib.Path(__file__).with_name(f"{name}.py") for name in own)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
