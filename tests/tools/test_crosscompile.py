"""Every kernel compiles for Hopper and Blackwell, here, without a GPU; and the plan that feeds it never synchronises.

The calls are real ones on fake tensors. A plan that looked at a value on the device would raise under FakeTensorMode.
"""

from __future__ import annotations

import concurrent.futures
import itertools

import pytest

pytest.importorskip("flash_attn", reason="flash-attn-4 is not installed")
from fa4_prefixlm.geometry.traits import MOST_INTERVALS
from fa4_prefixlm.tools.crosscompile import TARGETS, Variant, compile_in_subprocess, standard_variants

VARIANTS = [(arch, variant) for arch in TARGETS for variant in standard_variants(arch)]


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, Variant], dict]:
    """Both architectures at once, one process each."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        done = pool.map(lambda arch: compile_in_subprocess(arch, standard_variants(arch)), TARGETS)
        return dict(zip(VARIANTS, itertools.chain.from_iterable(done), strict=True))


@pytest.mark.parametrize(("arch", "variant"), VARIANTS, ids=str)
def test_compiles(reports: dict, arch: str, variant: Variant) -> None:
    report = reports[arch, variant]
    assert report["error"] is None
    assert arch in report["kernel"]


def test_every_mask_mod_is_compiled(reports: dict) -> None:
    """Every layout and number of intervals, and the tags where a backend takes them."""
    wanted = {(layout, count, False) for layout in ("varlen", "packed") for count in range(1, MOST_INTERVALS + 1)}
    wanted.add(("varlen", 1, True))
    by_mask_mod = [(arch, variant) for arch, variant in VARIANTS if variant.backend in ("varlen", "packed")]
    assert wanted == {variant.kernel for _, variant in by_mask_mod}
    for arch, variant in by_mask_mod:
        report, (_, count, tagged) = reports[arch, variant], variant.kernel
        assert f"{count} interval" in report["kernel"]
        assert ("a block of tags" in report["kernel"]) == tagged
