"""The known defects of FA4 builds, and what this library does about each. Values, for `doctor` and `check`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """A known defect.

    Attributes:
        name: a short handle, stable in JSON.
        effect: what goes wrong where the build is called without this library.
        workaround: what this library does about it.
        found_by: "source", or "run" where only running the build shows whether it has the defect (`check` runs it).
    """

    name: str
    effect: str
    workaround: str
    found_by: str = "source"


SM90_LIST_STRIDE = Defect(
    "sm90-list-stride",
    "SM90 reads varlen block lists with the row stride of a 128-key tile: silently wrong with any other tile",
    "worked around: the kernel is compiled with its own tile sizes (fa4/kernels/workarounds.py)",
)
CAUSAL_KEPT = Defect(
    "causal-over-mask-mod",
    "causal=True or a window beside a mask_mod is kept, and the mask_mod is skipped or clipped: silently wrong",
    "avoided: never passed together",
)
SINK_BFLOAT16 = Defect(
    "sink-bfloat16-only",
    "attention sinks must be bfloat16",
    "worked around: other sinks are applied to the kernel's output, in float32",
)
PAGED_LISTS = Defect(
    "paged-block-lists",
    "SM90 with block lists over pages does not go through the page table: silently wrong at page size = key tile, "
    "and no kernel at any other",
    "avoided: never passed together",
    found_by="run",
)
SM90_BACKWARD_HEAD_DIMS = Defect(
    "sm90-backward-head-dims",
    "the SM90 backward rounds head dims up to multiples of 16, the kernels around it to multiples of 32: silently "
    "wrong gradients at 8, 16, 40, 48, 72, 80, 104 and 112",
    "worked around: the native backward rounds as they do; the other backwards are refused at these head dims",
)


def defects(
    *,
    varlen_lists: bool,
    sm90_list_stride: str,
    causal_with_mask: str,
    sinks_in_float32: bool,
    block_lists: bool,
    sm90_backward_head_dims: str = "right",
) -> tuple[Defect, ...]:
    """The defects of a build, given what its source says. See `Build`."""
    found = {
        SM90_LIST_STRIDE: varlen_lists and sm90_list_stride == "128",
        CAUSAL_KEPT: causal_with_mask == "kept",
        SINK_BFLOAT16: not sinks_in_float32,
        PAGED_LISTS: varlen_lists and block_lists,
        SM90_BACKWARD_HEAD_DIMS: sm90_backward_head_dims == "wrong",
    }
    return tuple(defect for defect, present in found.items() if present)
