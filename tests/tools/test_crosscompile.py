"""Every kernel compiles for Hopper and Blackwell, here, without a GPU; and the plan that feeds it never synchronises.

The calls are real ones on fake tensors. A plan that looked at a value on the device would raise under FakeTensorMode.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import pathlib

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


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "variant"), VARIANTS, ids=str)
def test_compiles(reports: dict, arch: str, variant: Variant) -> None:
    report = reports[arch, variant]
    assert report["error"] is None
    assert arch in report["kernel"]


@pytest.mark.slow
def test_every_mask_mod_is_compiled(reports: dict) -> None:
    """Every layout and number of intervals, and the tags where a backend takes them."""
    wanted = {(layout, count, False) for layout in ("varlen", "packed") for count in range(1, MOST_INTERVALS + 1)}
    wanted.add(("varlen", 1, True))
    by_mask_mod = [(arch, variant) for arch, variant in VARIANTS if variant.kernel[0] in ("varlen", "packed")]
    assert wanted == {variant.kernel for _, variant in by_mask_mod}
    for arch, variant in by_mask_mod:
        report, (_, count, tagged) = reports[arch, variant], variant.kernel
        assert f"{count} interval" in report["kernel"]
        assert ("and tags" in report["kernel"]) == tagged


def test_reports_come_while_the_process_runs(tmp_path: pathlib.Path) -> None:
    """A check tells of each kernel when it is compiled. Here the second report waits until the first was told."""
    python, told = tmp_path / "python", tmp_path / "told"
    python.write_text(
        "#!/bin/sh\n"
        "echo a compiler that talks\n"
        "echo '{\"n\": 1}'\n"
        f"for i in 1 2 3 4 5 6 7 8 9 10; do if [ -e '{told}' ]; then break; fi; sleep 1; done\n"
        f"[ -e '{told}' ] && echo '{{\"n\": 2}}'\n"
    )
    python.chmod(0o755)
    variants = [Variant("varlen", 64, 64), Variant("varlen", 128, 128)]
    seen: list[int] = []

    def done(report: dict) -> None:
        seen.append(report["n"])
        told.touch()

    assert compile_in_subprocess("sm_90", variants, python=str(python), done=done) == [{"n": 1}, {"n": 2}]
    assert seen == [1, 2]


def test_a_process_that_dies_says_why(tmp_path: pathlib.Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="died:(.|\n)*out of memory"):
        compile_in_subprocess("sm_90", [Variant("varlen", 64, 64)], python=str(python))
