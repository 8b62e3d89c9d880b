"""The known defects of FA4 builds, and what this library does about each. Values, for `doctor` and `check`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """name: a short handle, stable in JSON. effect: what goes wrong for who calls the build by itself.

    cure: what this library does about it. told_by: "source", or "run" where only running it tells (`check` does).
    """

    name: str
    effect: str
    cure: str
    told_by: str = "source"


SM90_LIST_STRIDE = Defect(
    "sm90-list-stride",
    "SM90 reads varlen block lists with the row stride of a 128-key tile: silently wrong with any other tile",
    "cured: the kernel is compiled with its own tile sizes (fa4/kernels/workarounds.py)",
)
CAUSAL_KEPT = Defect(
    "causal-over-mask-mod",
    "causal=True or a window beside a mask_mod is kept, and the mask_mod is skipped or clipped: silently wrong",
    "avoided: never passed together",
)
SINK_BFLOAT16 = Defect(
    "sink-bfloat16-only",
    "attention sinks must be bfloat16",
    "cured: other sinks are applied to the kernel's output, in float32",
)
PAGED_LISTS = Defect(
    "paged-block-lists",
    "SM90 with block lists over pages does not go through the page table: silently wrong at page size = key tile, "
    "and no kernel at any other",
    "avoided: never passed together",
    told_by="run",
)


def defects(
    *, varlen_lists: bool, sm90_list_stride: str, causal_with_mask: str, sinks_in_float32: bool, block_lists: bool
) -> tuple[Defect, ...]:
    """Those of a build that is described so."""
    found = {
        SM90_LIST_STRIDE: varlen_lists and sm90_list_stride == "128",
        CAUSAL_KEPT: causal_with_mask == "kept",
        SINK_BFLOAT16: not sinks_in_float32,
        PAGED_LISTS: varlen_lists and block_lists,
    }
    return tuple(defect for defect, present in found.items() if present)
