"""Compile and launch the native backend's kernel, without FA4's interface and its host time."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch

from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.device_checks import is_capturing
from fa4_prefixlm.errors import UnsupportedError
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.fa4.kernels import disk_cache
from fa4_prefixlm.fa4.kernels.launch import on_device
from fa4_prefixlm.fa4.kernels.tiles import Tile

THREADS, STAGES = 384, 2


@dataclasses.dataclass(frozen=True)
class NativeKernel:
    """A variant of the kernel, except for head dims, dtypes and the layout of its tensors.

    Attributes:
        tile: the forward tile.
        heads_in_tile: query heads of one key head that share a query tile (FA4's PackGQA); divides `tile.m`.
        lower: some row's interval begins past key 0.
    """

    tile: Tile
    heads_in_tile: int
    lower: bool

    @property
    def tokens(self) -> int:
        """Query tokens of a tile."""
        return self.tile.m // self.heads_in_tile


def native_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    build: Build,
    kernel: NativeKernel,
    bounds: torch.Tensor,
    tiles: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    keys: Keys,
    options: Options,
) -> None:
    """Write attention over the keys in `bounds` to `out` and `lse`.

    Args:
        q: `(total_q, heads, head_dim)` on the device.
        k, v: `(total_k, kv_heads, head_dim)`, or the cache, `(pages, page_size, kv_heads, head_dim)`.
        out: `(total_q, heads, head_dim_v)`.
        lse: `(heads, total_q)` float32.
        build: the FA4 whose kernel runs.
        kernel: which variant of it.
        bounds, tiles: see `native.row_intervals`; query tiles have `kernel.tokens` tokens.
        cu_seqlens_q: `(batch + 1,)` int32 on the device.
        keys: where the keys are.
        options: scale, softcap and sink.

    Raises:
        UnsupportedError: the kernel is not compiled yet, and a CUDA graph is being captured.
    """
    parts = _parts(build)
    q, k, v = (parts.contiguous(_detached(tensor)) for tensor in (q, k, v))
    sink = options.learnable_sink
    sink = None if sink is None else parts.contiguous(_detached(sink), align_bytes=4)
    page_size = None if keys.page_table is None else k.shape[1]
    key = (
        kernel,
        options.softcap,
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        q.shape[-2] // k.shape[-2],
        None if page_size is None else page_size == kernel.tile.n,
        None if sink is None else sink.dtype,
        tuple(parts.broadcast(tensor) for tensor in (q, k, v)),
    )
    tensors = {
        "mQ": q,
        "mK": k,
        "mV": v,
        "mO": _detached(out),
        "mLSE": lse,
        "softmax_scale": options.softmax_scale,
        "mCuSeqlensQ": cu_seqlens_q,
        "mCuSeqlensK": keys.cu_seqlens_k,
        "mSeqUsedK": keys.seqused_k,
        "mPageTable": keys.page_table,
        "learnable_sink": sink,
    }
    with on_device(q):
        run = parts.compiled.get(key)
        if run is None:
            if is_capturing():
                expected = "one call of attention() before the capture, to compile the kernel"
                raise UnsupportedError("q, k, v", expected, f"a first call, {kernel}")
            if key not in parts.kernels:
                parts.kernels[key] = _compile(parts, kernel, options.softcap, tensors, bounds, tiles)
            run = parts.compiled[key] = parts.kernels[key]
        if not parts.is_fake() and q.shape[0] > 0:
            run(*parts.arguments(tensors, (bounds, tiles, *parts.no_lists)))


def _compile(
    parts: _BuildParts,
    kernel: NativeKernel,
    softcap: float,
    tensors: dict[str, Any],
    bounds: torch.Tensor,
    tiles: torch.Tensor,
) -> Any:
    from cutlass import cute

    from fa4_prefixlm.fa4.kernels.native import kernel_class, row_intervals

    q, k, v = tensors["mQ"], tensors["mK"], tensors["mV"]
    forward = kernel_class(parts.module)(
        parts.dtypes[q.dtype],
        q.shape[-1],
        v.shape[-1],
        q.shape[-2] // k.shape[-2],
        is_causal=False,
        is_local=True,  # longest query tiles first (LPT)
        pack_gqa=kernel.heads_in_tile > 1,
        tile_m=kernel.tile.m,
        tile_n=kernel.tile.n,
        num_stages=STAGES,
        num_threads=THREADS,
        Q_in_regs=False,
        intra_wg_overlap=True,
        mma_pv_is_rs=kernel.tile.p_in_registers,
        mask_mod=None,
        score_mod=parts.softcap(softcap) if softcap else None,
        has_aux_tensors=False,
        paged_kv_non_tma=tensors["mPageTable"] is not None and k.shape[1] != kernel.tile.n,
        lower=kernel.lower,
    )
    wide = ("mQ", "mK", "mV", "mO")
    described = {
        name: parts.describe(value, assumed_align=16 if name in wide else 4)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in tensors.items()
    }
    rows = row_intervals(parts.module, parts.describe(bounds, assumed_align=8), parts.describe(tiles, assumed_align=16))
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(forward, *parts.arguments(described, rows), stream, options="--enable-tvm-ffi")


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


class _BuildParts:
    """The parts of a build that the launch uses, looked up once."""

    def __init__(self, build: Build) -> None:
        utils, tools = build.part("cute_dsl_utils"), build.part("utils")
        call = build.part("flash_fwd_sm90").FlashAttentionForwardSm90.__call__
        self.module = build.module
        self.names = [name for name in inspect.signature(call).parameters if name not in ("self", "stream")]
        self.defaults = {"aux_data": tools.AuxData()}
        self.no_lists = (None,) * (len(build.part("block_sparsity").BlockSparseTensors._fields) - 2)
        self.contiguous, self.broadcast = utils.maybe_contiguous, utils.get_broadcast_dims
        self.describe, self.dtypes = utils.to_cute_tensor, utils.torch2cute_dtype_map
        self.softcap, self.is_fake = tools.create_softcap_scoremod, build.part("testing").is_fake_mode
        self.compiled: dict[object, Any] = {}
        self.kernels = disk_cache.kernels(build, "native")

    def arguments(self, values: dict[str, Any], rows: Any) -> list[Any]:
        """The arguments of the build's `FlashAttentionForwardSm90.__call__`, in its order."""
        given = {**self.defaults, **values, "blocksparse_tensors": rows}
        return [given.get(name) for name in self.names]


@functools.cache
def _parts(build: Build) -> _BuildParts:
    return _BuildParts(build)
