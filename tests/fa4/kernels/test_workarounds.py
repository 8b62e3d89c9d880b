"""Workarounds, in kernels compiled without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("flash_attn", reason="flash-attn-4 is not installed")

pytestmark = pytest.mark.slow

WORKAROUND_SCRIPT = """
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


@pytest.mark.parametrize(("workaround", "seen"), [("on", "tile_n {80}"), ("off", "tile_n {128}")])
def test_the_workaround_gives_the_sm90_kernel_its_tile(workaround: str, seen: str) -> None:
    """With it off the kernel reads varlen block lists with the stride of a 128-key tile: the defect."""
    from fa4_prefixlm.fa4.builds import locate

    if locate.installed().sm90_list_stride != "128":
        pytest.skip("the installed build does not have the defect")
    done = subprocess.run(
        [sys.executable, "-c", WORKAROUND_SCRIPT, workaround], capture_output=True, text=True, check=False
    )
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


def test_the_workaround_leaves_fa4_as_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", RESTORE_SCRIPT], capture_output=True, text=True, check=False)
    assert "as it was" in done.stdout, done.stderr
