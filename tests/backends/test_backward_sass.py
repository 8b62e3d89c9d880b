"""The machine code of the native backward: its products must not wait for each other, and nothing may spill.

ptxas serialises warp group products (WGMMA) where it can't follow their registers: a right kernel at a fraction of its
speed. It then fences every product, so the loop over query tiles has dozens of WARPGROUP instructions in place of a
few. No GPU is needed: the kernels are cross-compiled, and read with the cuobjdump of Triton's wheel.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("flash_attn", reason="flash-attn-4 is not installed")
triton = pytest.importorskip("triton", reason="triton is not installed")

from fa4_prefixlm.tools.crosscompile import TARGETS, Variant  # noqa: E402

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Fences of a loop whose products run beside each other; serialised ones have 60 and more.
MOST_FENCES = 16
KERNELS = {
    "hd64": Variant("native", 64, 64, backward="native"),
    "hd96": Variant("native", 96, 96, heads=(4, 4), backward="native"),
    "hd128": Variant("native", 128, 128, backward="native"),
    "hd128 window": Variant("native", 128, 128, window=256, backward="native"),
    "hd128, deterministic": Variant("native", 128, 128, backward="native", deterministic=True),
    "hd128 window, deterministic": Variant("native", 128, 128, window=256, backward="native", deterministic=True),
    "hd192": Variant("native", 192, 192, backward="native"),
    "hd256": Variant("native", 256, 256, backward="native"),
    "hd256, deterministic": Variant("native", 256, 256, backward="native", deterministic=True),
    "hd256, softcap": Variant("native", 256, 256, softcap=30.0, heads=(4, 4), backward="native"),
    "hd64, folded": Variant("native", 64, 64, backward="native"),
    "hd96, folded": Variant("native", 96, 96, backward="native"),
    "hd128, folded": Variant("native", 128, 128, backward="native"),
    "hd128 window, MQA, folded": Variant("native", 128, 128, window=256, heads=(8, 1), backward="native"),
    "hd128, two intervals, folded": Variant("varlen", 128, 128, mask="two", heads=(6, 2), backward="native"),
    "hd256, folded": Variant("native", 256, 256, backward="native"),
    "hd256, softcap, folded": Variant("native", 256, 256, softcap=30.0, backward="native"),
    "hd256 window": Variant("native", 256, 256, window=256, heads=(4, 4), backward="native"),
}
SERIALISED = "hd64, all tiles masked"

SCRIPT = """
import dataclasses, json, os, pathlib, sys
from fa4_prefixlm.backends import native_backward
from fa4_prefixlm.tools.crosscompile import Variant, compile_variant
folder = pathlib.Path(os.environ["CUTE_DSL_DUMP_DIR"])
chosen = native_backward.native_tile
for index, (name, spec) in enumerate(json.load(sys.stdin).items()):
    spec["heads"] = tuple(spec["heads"])
    changes = {"fold_from": 0 if name.endswith("folded") else None}
    if name.endswith("all tiles masked"):
        changes["skip_full"] = False
    native_backward.native_tile = lambda *a, **k: dataclasses.replace(chosen(*a, **k), **changes)
    compile_variant(Variant(**spec))
    (made,) = folder.glob("*PrefixLMBackward*.cubin")  # every kernel has the same name
    print(json.dumps([name, str(made.rename(folder / f"{index}.kept"))]), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop over query tiles. fences: WARPGROUP instructions. spilled: reads and writes of local memory."""

    products: int
    fences: int
    spilled: int


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loop]:
    if not CUOBJDUMP.is_file():
        pytest.skip("this Triton has no cuobjdump")
    folder = tmp_path_factory.mktemp("cubins")
    specs = {name: dataclasses.asdict(variant) for name, variant in KERNELS.items()}
    specs[SERIALISED] = specs["hd64"]
    keep = {"CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": str(folder)}
    environment = {**os.environ, **TARGETS["sm_90"], **keep, "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, input=json.dumps(specs), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("["):
            name, path = json.loads(line)
            found[name] = loop_of(path)
    return found


def loop_of(path: str) -> Loop:
    """The smallest loop with products and exponentials."""
    listing = subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", listing, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in lines]
    bodies = []
    for address, text in code:
        target = re.search(r"0x([0-9a-f]+)", text) if "BRA" in text else None
        if target and int(target[1], 16) < address:
            bodies.append([own for at, own in code if int(target[1], 16) <= at <= address])
    loops = [body for body in bodies if any("HGMMA" in own for own in body) and any("MUFU.EX2" in own for own in body)]
    assert loops, "no loop with products and exponentials"
    body = min(loops, key=len)
    names = collections.Counter(re.sub(r"^@!?U?P\w+\s+", "", own).split()[0].split(".")[0] for own in body)
    return Loop(names["HGMMA"], names["WARPGROUP"], names["LDL"] + names["STL"])


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_products_run_beside_each_other_and_nothing_spills(loops: dict[str, Loop], name: str) -> None:
    assert loops[name].products > 0
    assert loops[name].fences <= MOST_FENCES, loops[name]
    assert loops[name].spilled == 0, loops[name]


@pytest.mark.slow
def test_a_serialised_kernel_is_told(loops: dict[str, Loop]) -> None:
    """Head dim 64 is serialised where no branch skips the mask: why full tiles are not masked there."""
    assert loops[SERIALISED].fences > MOST_FENCES
