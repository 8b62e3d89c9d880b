"""Call FA4's own backward: causal or windowed, and block-sparse with a mask_mod."""

from __future__ import annotations

import torch

from fa4_prefixlm.batch.forward_pass import ForwardPass, Grads
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.fa4.kernels.launch import MaskCode, block_sparse_tensors, on_device
from fa4_prefixlm.geometry.block_lists import BlockLists


def causal_backward(
    forward: ForwardPass,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    *,
    build: Build,
    lengths: Lengths,
    window: int | None,
    options: Options,
    deterministic: bool = False,
) -> Grads:
    """`(dq, dk, dv)` by FA4's own varlen backward: the peer of every benchmark and error band."""
    q, k, v, out, lse = forward
    with on_device(q):
        dq, dk, dv, *_ = build.part("interface")._flash_attn_bwd(
            *(q, k, v, out, dout, lse, options.softmax_scale),
            causal=window is None,
            softcap=options.softcap,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
            cu_seqlens_q=lengths.cu_seqlens_q,
            cu_seqlens_k=lengths.cu_seqlens_k,
            max_seqlen_q=lengths.max_seqlen_q,
            max_seqlen_k=lengths.max_seqlen_k,
            deterministic=deterministic,
            dlse=dlse,
        )
    return dq, dk, dv


def packed_backward(
    forward: ForwardPass,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    *,
    build: Build,
    code: MaskCode,
    lists: BlockLists,
    options: Options,
) -> Grads:
    """`(dq, dk, dv)` under the mask of `code`, the batch as one sequence. lists: query tiles by key tile."""
    q, k, v, out, lse = forward
    with on_device(q):
        dq, dk, dv, *_ = build.part("interface")._flash_attn_bwd(
            *(tensor.unsqueeze(0) for tensor in (q, k, v, out, dout, lse)),
            options.softmax_scale,
            softcap=options.softcap,
            mask_mod=code.mask_mod(build),
            aux_tensors=code.aux_tensors,
            block_sparse_tensors=block_sparse_tensors(lists, build),
            dlse=None if dlse is None else dlse.unsqueeze(0),
        )
    return dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)
