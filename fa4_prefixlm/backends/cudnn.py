"""cudnn: `cudnn.flex_attention` of nvidia-cudnn-frontend, over the batch as one sequence. Experimental, as it is there.

It takes the ends of a row's intervals, any number of them. Making its plan reads values back, so a plan on this backend
synchronises; every other part of it does not. It has no softcap and no sinks.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

import torch

from fa4_prefixlm.backends.base import Backend, MaskedBatch, Prepared
from fa4_prefixlm.backends.fa4_verdicts import DTYPES, not_run
from fa4_prefixlm.backends.flex import FlexCall, flex_call, flex_refusal
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.errors import UnsupportedError
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.geometry.intervals import Bounds
from fa4_prefixlm.geometry.traits import Traits, in_words

PACKAGE, LEAST_VERSION = "nvidia-cudnn-frontend", (1, 32)
ARCHS = (90, 100, 103)
WIDE_HEAD_DIMS = ((192, 128), (256, 256))  # besides all up to 128
ALIGNMENT = 128  # bytes; its kernels copy no tensor that is not aligned


@dataclass
class CudnnCall(Prepared):
    """One launch.

    Attributes:
        spec: of the tensors.
        plan: its own plan of the mask; None: there are no keys.
        intervals: of a row.
        blind: `(total_q,)` bool, rows that see nothing; None: there is none.
        or_flex: runs calls with a softcap or sinks; None: they are refused.
    """

    spec: CallSpec
    plan: Any
    intervals: int
    blind: torch.Tensor | None
    or_flex: FlexFor | None = None

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not is_plain(options, self.or_flex):
            assert self.or_flex is not None
            return self.or_flex.call.run(q, k, v, options, out)
        if self.plan is None:
            result = q.new_zeros(*q.shape[:2], v.shape[2])
            lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32, device=q.device)
        else:
            result, lse = api().flex_attn_func(
                *(aligned(own).unsqueeze(0) for own in (q, k, v)),
                mask_plan=self.plan,
                softmax_scale=options.softmax_scale,
                return_lse=True,
            )
            result, lse = result.squeeze(0), lse.squeeze(0)
        if self.blind is not None:
            result = result.masked_fill_(self.blind[:, None, None], 0)
            lse = lse.masked_fill_(self.blind, float("-inf"))
        return (result, lse) if out is None else (out.copy_(result), lse)

    def describe(self) -> list[tuple[str, str]]:
        version, words = importlib.metadata.version(PACKAGE), in_words(self.intervals, tagged=False)
        lines = [("kernel", f"{PACKAGE} {version}, sm_{self.spec.arch}{not_run(self.spec.device)}, {words}")]
        return [*lines, ("else", "softcap and sinks run on flex")] if self.or_flex is not None else lines


@dataclass
class FlexFor:
    """`flex` for a batch, made when it is first needed: what was taken without its name runs every call."""

    batch: MaskedBatch

    @classmethod
    def of(cls, batch: MaskedBatch) -> FlexFor | None:
        """None: flex can't run it either."""
        return cls(batch) if flex_refusal(batch.spec) is None else None

    @functools.cached_property
    def call(self) -> FlexCall:
        """Its state."""
        return flex_call(self.batch)


class Cudnn(Backend):
    name = "cudnn"
    summary = "cudnn.flex_attention over the batch as a single sequence, block-sparse"

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None) -> str | None:
        if traits.tagged:
            return "it takes intervals, and a block of spans has none that kernels count"
        return cudnn_refusal(spec)

    def prepare(self, batch: MaskedBatch) -> CudnnCall:
        bounds = in_use(batch.packed_bounds)
        blind = (bounds.lo >= bounds.hi).all(1)
        plan = None if batch.lengths.total_k == 0 else mask_plan(batch, bounds, with_backward=False)
        return CudnnCall(batch.spec, plan, bounds.count, blind if blind.any() else None)


def cudnn_refusal(spec: CallSpec) -> str | None:
    """Why cuDNN's front end can't run the call's forward, whatever the mask; None if it can."""
    if spec.device.type != "cuda":
        return f"cuDNN needs a GPU, the tensors are on {spec.device}"
    lacking = _not_installed()
    if lacking is not None:
        return lacking
    if spec.arch not in ARCHS:
        return f"cudnn.flex_attention runs on {', '.join(f'sm_{arch}' for arch in ARCHS)}, not sm_{spec.arch}"
    if spec.dtype not in DTYPES:
        return f"cudnn.flex_attention takes bfloat16 and float16, not {spec.dtype}"
    dims = spec.head_dim, spec.head_dim_v
    if dims not in WIDE_HEAD_DIMS and (max(dims) > 128 or any(dim % 8 for dim in dims)):
        more = ", ".join(map(str, WIDE_HEAD_DIMS))
        return f"cudnn.flex_attention takes head dims up to 128 that are multiples of 8, {more}"
    return None


@functools.cache
def _not_installed() -> str | None:
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} is not installed"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < LEAST_VERSION:
        return f"{PACKAGE} {version} is older than {'.'.join(map(str, LEAST_VERSION))}"
    return None


def api() -> Any:
    """`cudnn.flex_attention`, imported where it is first used."""
    from cudnn import flex_attention

    return flex_attention


def is_plain(options: Options, or_flex: object) -> bool:
    """There is no softcap and no sink. False: what has them is to run on `or_flex`.

    Raises:
        UnsupportedError: there are, and nothing else is to run them.
    """
    plain = not options.softcap and options.learnable_sink is None
    if not plain and or_flex is None:
        name = "softcap" if options.softcap else "learnable_sink"
        got = options.softcap if options.softcap else "a tensor"
        raise UnsupportedError(name, "none on the backend cudnn (backend='flex' takes it)", got)
    return plain


def mask_plan(batch: MaskedBatch, bounds: Bounds, *, with_backward: bool) -> Any:
    """Its plan of the mask. Reads values back: the device is waited for."""
    spec, lengths = batch.spec, batch.lengths
    q, k, v = (
        # It looks at shapes alone: one row stands for all.
        torch.empty(dim, dtype=spec.dtype, device=spec.device).expand(1, tokens, heads, dim)
        for tokens, heads, dim in (
            (lengths.total_q, spec.heads_q, spec.head_dim),
            (lengths.total_k, spec.heads_kv, spec.head_dim),
            (lengths.total_k, spec.heads_kv, spec.head_dim_v),
        )
    )
    return api().create_mask_plan(interval_ends(bounds), q, k, v, build_backward=with_backward)


def in_use(bounds: Bounds) -> Bounds:
    """Without the intervals that no row has, which would cost its kernels as much as any. Waits for the device."""
    used = (bounds.lo < bounds.hi).any(0)
    used[0] |= used.logical_not().all()  # one is left, if only an empty one
    return Bounds(bounds.lo[:, used], bounds.hi[:, used])


def interval_ends(bounds: Bounds) -> torch.Tensor:
    """`(1, 2 * K + 1, total_q)` int32 that never fall: a row sees keys `[0, F[0])`, `[F[1], F[2])`, and so on.

    The first is empty: sequences begin where they begin in the packed keys. An empty interval begins and ends where the
    one before it ended.
    """
    empty = bounds.lo >= bounds.hi
    end = bounds.hi.masked_fill(empty, 0).cummax(1).values
    begin = torch.where(empty, end, bounds.lo)
    ends = torch.stack([begin, end], dim=2).flatten(1)
    # A copy, also of a single row: `contiguous` would keep its strides, of which cuDNN takes one for the wrong one.
    return torch.nn.functional.pad(ends, (1, 0)).T.clone(memory_format=torch.contiguous_format).unsqueeze(0)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it that cuDNN's kernels can read."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
