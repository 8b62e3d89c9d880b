"""Launch one FA4 forward. What FA4 could choose by itself (tile, PackGQA) is given explicitly."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fa4_prefixlm.batch.keys import Keys
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.fa4.kernels import disk_cache, workarounds
from fa4_prefixlm.fa4.kernels.tiles import Tile
from fa4_prefixlm.geometry.block_lists import BlockLists
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO

# FA4 evaluates a mask_mod on every row of a query tile and every key of a key tile, past the last one too. The largest
# tile has 256 rows (SM100).
PADDING = 256
NO_ROW, NO_KEY = -1, -2


@dataclasses.dataclass(frozen=True)
class MaskCode:
    """A mask_mod and the tensors it reads.

    Attributes:
        layout: "varlen" or "packed", the function of `mask_mods` that makes it.
        intervals: per row.
        aux_tensors: see `mask_mods`; or those of `own`.
        own: the user's own mask_mod (`from_cute`); None: one of `mask_mods`.
    """

    layout: str
    intervals: int
    aux_tensors: list[torch.Tensor]
    own: Callable[..., Any] | None = None

    def mask_mod(self, build: Build) -> Callable[..., Any]:
        if self.own is not None:
            return self.own
        from fa4_prefixlm.fa4.kernels import mask_mods

        make: Callable[..., Any] = getattr(mask_mods, self.layout)
        return make(self.intervals, len(self.aux_tensors) > 1, build.module)


def mask_code(layout: str, bounds: Bounds) -> MaskCode:
    """Bounds as the library's mask_mods read them, see `mask_mods`."""
    lo = torch.nn.functional.pad(bounds.lo, (0, 0, 0, PADDING), value=EMPTY_LO)
    hi = torch.nn.functional.pad(bounds.hi, (0, 0, 0, PADDING), value=EMPTY_HI)
    tensors = [torch.stack([lo, hi], dim=2)]
    if bounds.tags is not None:
        tensors.append(torch.nn.functional.pad(bounds.tags.row_tag, (0, PADDING), value=NO_ROW))
        tensors.append(torch.nn.functional.pad(bounds.tags.key_tag, (0, PADDING), value=NO_KEY))
    return MaskCode(layout, bounds.count, tensors)


def block_sparse_tensors(lists: BlockLists, build: Build) -> Any:
    """Block lists as the build takes them."""
    varlen = {"cu_total_m_blocks": lists.cu_tiles, "cu_block_idx_offsets": lists.cu_entries}
    return build.part("block_sparsity").BlockSparseTensorsTorch(
        mask_block_cnt=lists.partial_count,
        mask_block_idx=lists.partial_idx,
        full_block_cnt=lists.full_count,
        full_block_idx=lists.full_idx,
        block_size=lists.block_size,
        **(varlen if lists.cu_tiles is not None else {}),
    )


def masked_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    lengths: Lengths | None,
    build: Build,
    code: MaskCode,
    lists: BlockLists | None,
    tile: Tile,
    pack_gqa: bool,
    options: Options,
) -> None:
    """Write attention under the mask of `code` to `out` and `lse`.

    Args:
        q, k, v, out: `(total, heads, head_dim)` of a varlen call; without `lengths`, `(1, seqlen, heads, head_dim)`.
        lse: `(heads, total_q)` float32; without `lengths`, `(1, heads, seqlen)`.
        lengths: those of a varlen call.
        build: the FA4 to launch.
        code: the mask_mod, with the tensors it reads.
        lists: block lists; None: every key tile is visited.
        tile: the forward tile, with which the lists were cut.
        pack_gqa: FA4's PackGQA.
        options: scale, softcap and sink.
    """
    sparse = None if lists is None else block_sparse_tensors(lists, build)
    sink, late_sink = _sinks(options.learnable_sink, build)
    needs_workaround = lists is not None and lengths is not None and build.sm90_list_stride == "128"
    with contextlib.ExitStack() as during:
        during.enter_context(on_device(q))
        changed = during.enter_context(workarounds.sm90_list_stride(build.module)) if needs_workaround else ""
        during.enter_context(disk_cache.own_kernels(build, changed, persist=code.own is None))
        build.part("interface")._flash_attn_fwd(
            q,
            k,
            v,
            cu_seqlens_q=lengths.cu_seqlens_q if lengths else None,
            cu_seqlens_k=lengths.cu_seqlens_k if lengths else None,
            max_seqlen_q=lengths.max_seqlen_q if lengths else None,
            max_seqlen_k=lengths.max_seqlen_k if lengths else None,
            softmax_scale=options.softmax_scale,
            softcap=options.softcap or None,
            learnable_sink=sink,
            tile_mn=(tile.m, tile.n),
            mma_pv_is_rs=tile.p_in_registers,
            pack_gqa=pack_gqa,
            mask_mod=code.mask_mod(build),
            block_sparse_tensors=sparse,
            aux_tensors=code.aux_tensors,
            out=out,
            lse=lse,
        )
    if late_sink is not None:
        assert lse is not None, "every launch of this library asks for the LSE"
        _add_sink(out, lse, late_sink)


def causal_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    build: Build,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    keys: Keys,
    options: Options,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FA4's own causal varlen call with its own tiles, `(out, lse)`: the baseline of benchmarks and errors."""
    sink, late_sink = _sinks(options.learnable_sink, build)
    pages = {} if keys.page_table is None else {"seqused_k": keys.seqused_k, "page_table": keys.page_table}
    with on_device(q), disk_cache.own_kernels(build):
        out, lse, *_ = build.part("interface")._flash_attn_fwd(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=keys.cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=keys.max_seqlen_k,
            softmax_scale=options.softmax_scale,
            softcap=options.softcap or None,
            learnable_sink=sink,
            causal=window is None,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
            return_lse=True,
            out=out,
            **pages,
        )
    if late_sink is not None:
        _add_sink(out, lse, late_sink)
    return out, lse


def _sinks(sink: torch.Tensor | None, build: Build) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(the sink for the kernel, the one to add to its output): the latter where the build does not take its dtype."""
    return (sink, None) if sink is None or sink.dtype in build.sink_dtypes else (None, sink)


def _add_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> None:
    """Let `sink` `(heads,)` join the softmax of `out` `(..., seqlen, heads, head_dim)`, in place.

    lse: `(..., heads, seqlen)` without the sink, and with it afterwards.
    """
    sink = sink.float().unsqueeze(1)
    out.mul_(torch.sigmoid(lse - sink).transpose(-1, -2).unsqueeze(-1))
    torch.logaddexp(lse, sink, out=lse)


def on_device(q: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """The CUDA device of `q` made current; nothing where torch has no CUDA (fake tensors)."""
    return torch.cuda.device(q.device) if torch.cuda.is_available() else contextlib.nullcontext()
