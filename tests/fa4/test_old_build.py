"""The library on flash-attn-4 4.0.0b12, which refuses a varlen mask_mod: what it takes, and that it compiles there.

In an environment of its own, OLD_FA4_PYTHON, which `make test` makes. Nothing runs on a GPU here.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import subprocess

import pytest

from fa4_prefixlm.tools.crosscompile import TARGETS, Variant, compile_in_subprocess, old_build_variants

PYTHON = os.environ.get("OLD_FA4_PYTHON", "")
VARIANTS = [(arch, variant) for arch in TARGETS for variant in old_build_variants(arch)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON and not os.environ.get("CI"), reason="OLD_FA4_PYTHON is not set: `make test` sets it"
    ),
]


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, Variant], dict]:
    """Both architectures at once, one process each."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        done = pool.map(lambda arch: compile_in_subprocess(arch, old_build_variants(arch), python=PYTHON), TARGETS)
        return dict(zip(VARIANTS, itertools.chain.from_iterable(done), strict=True))


@pytest.mark.parametrize(("arch", "variant"), VARIANTS, ids=str)
def test_the_shim_compiles(reports: dict, arch: str, variant: Variant) -> None:
    report = reports[arch, variant]
    assert report["error"] is None
    assert f"flash-attn-4 4.0.0b12, {arch}" in report["kernel"]


CHOICES = """
import os, warnings
os.environ["FLASH_ATTENTION_ARCH"] = "sm_90"
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import fa4_prefixlm as fp

with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    q = torch.empty(500, 4, 128, dtype=torch.bfloat16, device="cuda")
    table = torch.empty(1, 40, dtype=torch.int32, device="cuda")
    cache = torch.empty(40, 16, 2, 128, dtype=torch.bfloat16, device="cuda")
    for _ in range(2):
        contiguous = fp.plan([[(4, 260)]], like=(q, q, q), cu_seqlens_q=[0, 500], cu_seqlens_k=[0, 500])
        paged = fp.plan(
            [[(4, 260)]], like=(q, cache, cache), cu_seqlens_q=[0, 500], seqused_k=[500], page_table=table
        )
for plan in (contiguous, paged):
    print(plan.choice)
    print(*plan.choice.passed_over, sep="\\n")
print("warnings:", *(str(warning.message) for warning in caught), sep="\\n")
"""


def test_what_it_takes_and_says() -> None:
    done = subprocess.run([PYTHON, "-c", CHOICES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    choices, _, warned = done.stdout.partition("warnings:\n")
    assert "packed: one FlashAttention-4 call" in choices
    assert "two_pass: FlashAttention-4's own causal call" in choices
    assert "flash-attn-4 4.0.0b12 refuses mask_mod with aux_tensors for varlen" in choices
    lines = [line for line in warned.splitlines() if line.startswith("flash-attn-4 4.0.0b12: ")]
    assert [line.split(": ")[1] for line in lines] == [
        "fa4_prefixlm takes packed, not native",
        "fa4_prefixlm takes two_pass, not native",
    ]
    assert all(line.endswith("flash-attn-4 4.0.0b36 takes native, which is faster") for line in lines)
