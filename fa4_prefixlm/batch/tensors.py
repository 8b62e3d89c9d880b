"""The tensors of a call: their validation, and what a backend must know of them to be chosen."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fa4_prefixlm.batch.frozen import with_changes
from fa4_prefixlm.device_checks import is_fake
from fa4_prefixlm.errors import InputError

# What `k` and `v` are beside keys and nothing else, see `describe`.
Cache = Literal["pages", "static"] | None
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # in shorter ones torch does not even add


@dataclass(frozen=True)
class CallSpec:
    """Everything about `q`, `k`, `v` but their values.

    batched: `(batch, seqlen, heads, head_dim)` tensors; otherwise packed `(total, heads, head_dim)`.
    shape_q, shape_k: all dimensions before the heads.
    arch: compute capability of the device, 90 or 100; 0 where there is no such GPU.
    page_size: of keys and values in pages, `(pages, page_size, kv_heads, head_dim)`; None if they are contiguous.
    static_cache: the pages are a `(batch, max_seqlen, kv_heads, head_dim)` cache, one for each sequence.
    """

    batched: bool
    shape_q: tuple[int, ...]
    shape_k: tuple[int, ...]
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool
    arch: int
    page_size: int | None = None
    static_cache: bool = False

    @property
    def cache(self) -> Cache:
        """What `k` and `v` are, as `describe` takes it."""
        return None if self.page_size is None else "static" if self.static_cache else "pages"

    @property
    def of_any_size(self) -> CallSpec:
        """The same for any number of tokens: all that a backend looks at to tell whether it can run a call."""
        return with_changes(self, shape_q=(), shape_k=())

    def swapped_hint(self) -> str:
        """See `_swapped`; for an error that is raised anyway."""
        return _swapped((*self.shape_q, self.heads_q, 1), (*self.shape_k, self.heads_kv, 1))

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.shape_q, self.heads_q, self.head_dim_v)


def device_arch(device: torch.device) -> int:
    """Compute capability as FA4 counts it, 90 or 100; 0 where there is no such GPU.

    FA4's own environment variable `FLASH_ATTENTION_ARCH` (`sm_90`) overrides it: kernels are compiled for that.
    """
    return 0 if device.type != "cuda" else _cuda_arch(device.index, os.environ.get("FLASH_ATTENTION_ARCH", ""))


@functools.cache
def _cuda_arch(index: int | None, override: str) -> int:
    asked = re.fullmatch(r"(?:sm_?)?(\d+)[af]?", override, re.IGNORECASE)
    if asked:
        return int(asked[1])
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def describe(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cache: Cache = None) -> CallSpec:
    """Check `q`, `k`, `v` against each other. Looks at shapes, dtypes, strides and devices, never at values.

    Args:
        cache: "pages": `k` and `v` are `(pages, page_size, kv_heads, head_dim)`, and `q` is packed. "static": they are
            `(batch, max_seqlen, kv_heads, head_dim)` with room for more keys than there are, which is one page for each
            sequence. None: they hold the keys and nothing else.
    """
    if not _are_alike(q, k, v, cache):
        _say_what_differs(q, k, v, cache)
    if q.device.type not in ("cpu", "cuda") or (q.device.type == "cpu" and is_fake(q)):
        what = "a fake tensor" if is_fake(q) else f"device {q.device}"
        raise InputError("q, k, v", "tensors with values, on the CPU or a CUDA device", what)
    shape_q, heads_q, head_dim = _parts(q)
    shape_k, heads_kv, head_dim_k = _parts(k)
    shape_v, heads_v, head_dim_v = _parts(v)
    if shape_k != shape_v or heads_kv != heads_v:
        raise InputError("v", f"k's tokens and heads {(*shape_k, heads_kv)}", (*shape_v, heads_v))
    if head_dim != head_dim_k:
        raise InputError("k", f"q's head_dim {head_dim}", head_dim_k)
    if heads_q % heads_kv:
        raise InputError("q", f"a multiple of the {heads_kv} key heads", f"{heads_q} heads{_swapped(q.shape, k.shape)}")
    batched = len(shape_q) == 2
    if batched and shape_q[0] != shape_k[0]:
        raise InputError("k", f"q's batch size {shape_q[0]}", shape_k[0])
    if cache is not None and shape_k[1] == 0:
        raise InputError("k", "pages of at least one token", f"shape {tuple(k.shape)}")
    return CallSpec(
        batched=batched,
        shape_q=shape_q,
        shape_k=shape_k,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=q.dtype,
        device=q.device,
        needs_grad=(q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled(),
        arch=device_arch(q.device),
        page_size=shape_k[1] if cache is not None else None,
        static_cache=cache == "static",
    )


def _parts(tensor: torch.Tensor) -> tuple[tuple[int, ...], int, int]:
    """(all before the heads, heads, head dimension)."""
    *tokens, heads, head_dim = tensor.shape
    return tuple(tokens), heads, head_dim


def _are_alike(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache) -> bool:
    """The tensors pass all that `_say_what_differs` looks at: the usual case, in as little time as it takes."""
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        return False
    if cache is not None or not (q.ndim == k.ndim == v.ndim and q.ndim in (3, 4)):
        return False
    dtype, device = q.dtype, q.device
    if dtype not in DTYPES or k.dtype != dtype or v.dtype != dtype or k.device != device or v.device != device:
        return False
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        return False
    return q.numel() > 0 and k.numel() > 0 and v.numel() > 0


def _say_what_differs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache) -> None:
    """Refuse the first of the tensors that is not as it should be by itself, or not as `q`."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_layout(name, tensor, q, cache)
        if tensor.dtype not in DTYPES:
            raise InputError(name, f"one of {', '.join(map(str, DTYPES))}", tensor.dtype)
        if tensor.dtype != q.dtype:
            raise InputError(name, f"q's dtype {q.dtype}", tensor.dtype)
        if tensor.device != q.device:
            raise InputError(name, f"q's device {q.device}", tensor.device)
        if tensor.shape[-1] == 0 or tensor.shape[-2] == 0:
            raise InputError(name, "at least one head and one head dimension", f"shape {tuple(tensor.shape)}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise InputError(name, "a contiguous last dimension (stride 1)", f"stride {tensor.stride(-1)}")


def _check_layout(name: str, tensor: object, q: torch.Tensor, cache: Cache) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise InputError(name, "a torch.Tensor", type(tensor).__name__)
    got = f"shape {tuple(tensor.shape)}"
    if cache == "pages" and tensor.ndim != (3 if name == "q" else 4):
        wanted = "(total_q, heads, head_dim)" if name == "q" else "(pages, page_size, kv_heads, head_dim)"
        raise InputError(name, f"{wanted} with a page_table", got)
    if cache == "static" and name != "q" and tensor.ndim != 4:
        raise InputError(name, "(batch, max_seqlen, kv_heads, head_dim) with seqused_k and no page_table", got)
    if tensor.ndim not in (3, 4):
        raise InputError(name, "(total, heads, head_dim) or (batch, seqlen, heads, head_dim)", got)
    if tensor.ndim != q.ndim and cache is None:
        raise InputError(name, f"{q.ndim} dimensions, as q", got)


def _swapped(shape_q: Sequence[int], shape_k: Sequence[int]) -> str:
    """A hint if the tensors look like `(batch, heads, seqlen, head_dim)`: more heads than tokens on both sides."""
    looks = len(shape_q) == len(shape_k) == 4 and shape_q[2] > shape_q[1] and shape_k[2] > shape_k[1]
    return "; (batch, heads, seqlen, head_dim) goes in as tensor.transpose(1, 2)" if looks else ""


def check_out(out: torch.Tensor | None, spec: CallSpec) -> None:
    if out is None:
        return
    if not isinstance(out, torch.Tensor):
        raise InputError("out", "a torch.Tensor", type(out).__name__)
    if tuple(out.shape) != spec.out_shape:
        raise InputError("out", f"shape {spec.out_shape}", tuple(out.shape))
    if out.dtype != spec.dtype:
        raise InputError("out", f"q's dtype {spec.dtype}", out.dtype)
    if out.device != spec.device:
        raise InputError("out", f"q's device {spec.device}", out.device)
    if out.requires_grad and torch.is_grad_enabled():
        raise InputError("out", "a tensor without requires_grad: a kernel writes it in place", "requires_grad")
    if not out.is_contiguous():
        raise InputError("out", "a contiguous tensor", f"strides {out.stride()}")
    if out.data_ptr() % 16:
        raise InputError("out", "memory aligned to 16 bytes", f"an offset of {out.data_ptr() % 16}")
