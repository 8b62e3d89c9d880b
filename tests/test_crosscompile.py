"""Every kernel compiles for Hopper and Blackwell, here, without a GPU; and the plan that feeds it never synchronises.

The calls are real ones on fake tensors. A plan that looked at a value on the device would raise under FakeTensorMode.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import subprocess
import sys

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
        assert ("and tags" in report["kernel"]) == tagged


CURE_SCRIPT = """
import functools, os, sys
from fa4_prefixlm.fa4.kernels import workarounds
from fa4_prefixlm.tools import crosscompile
os.environ.update(crosscompile.TARGETS["sm_90"])
from flash_attn.cute.seqlen_info import SeqlenInfoQK
create, seen = SeqlenInfoQK.create, set()
def watched(*arguments, **keywords):
    seen.add(keywords.get("tile_n", 128))
    return create(*arguments, **keywords)
SeqlenInfoQK.create = staticmethod(watched)
workarounds._enabled = sys.argv[1] == "on"
crosscompile.compile_variant(crosscompile.Variant("varlen", 256, 256))
print("tile_n", seen)
"""


@pytest.mark.parametrize(("cure", "seen"), [("on", "tile_n {80}"), ("off", "tile_n {128}")])
def test_the_cure_gives_the_sm90_kernel_its_tile(cure: str, seen: str) -> None:
    """With the cure off the kernel reads varlen block lists with the stride of a 128-key tile: the defect."""
    from fa4_prefixlm.fa4.build import describe as build

    if build.installed().sm90_list_stride != "128":
        pytest.skip("the installed build does not have the defect")
    done = subprocess.run([sys.executable, "-c", CURE_SCRIPT, cure], capture_output=True, text=True, check=False)
    assert seen in done.stdout, done.stderr


RESTORE_SCRIPT = """
from fa4_prefixlm.fa4.kernels import workarounds
from flash_attn.cute import interface
before = interface.FlashAttentionForwardSm90
with workarounds.sm90_list_stride("flash_attn.cute"):
    during = interface.FlashAttentionForwardSm90
assert issubclass(during, before) and during is not before
assert interface.FlashAttentionForwardSm90 is before
print("as it was")
"""


def test_the_cure_leaves_fa4_as_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", RESTORE_SCRIPT], capture_output=True, text=True, check=False)
    assert "as it was" in done.stdout, done.stderr
