"""`fa4-prefixlm check` on a GPU: a build that is right passes, and kernels that are wrong in a known way do not."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from fa4_prefixlm.backends import base
from fa4_prefixlm.backends import select as backends
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.fa4.builds.defects import CAUSAL_KEPT, PAGED_LISTS, SM90_LIST_STRIDE
from fa4_prefixlm.fa4.builds.describe import Build
from fa4_prefixlm.tools.check import command, judge, workers
from fa4_prefixlm.tools.check.cases import CASES, Case
from fa4_prefixlm.tools.check.judge import CAUSAL, ProbeOutcome
from fa4_prefixlm.tools.check.probes import PROBES
from fa4_prefixlm.tools.check.run import run_case
from tests.tools.played_backends import Player, naive_two_pass
from tests.tools.rows_by_torch import rows_by_torch

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
MASKED = ("native", "varlen", "packed", "two_pass")
INSTALLED = locate.all_installed()


def verdict_on(case: Case, backend: str, build: str | None = None) -> judge.Verdict:
    """In this process. Skips where the backend is not offered."""
    module = build or INSTALLED[0].module
    outcome = run_case(case, backend, module, CUDA)
    if outcome.status == "refused":
        pytest.skip(outcome.reason)
    return judge.judge(case, outcome, run_case(case, CAUSAL, module, CUDA))


def test_the_installed_builds_pass(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "out.json"
    status = command.run(["--quiet", "--json", str(file)])
    content = json.loads(file.read_text())
    wrong = [
        (own["case"], own["backend"], own["verdict"], own["reason"])
        for build in content["builds"]
        for own in build["results"]
        if own["verdict"] not in ("ok", "refused")
    ]
    assert wrong == []
    assert status == 0, [build["probes"] for build in content["builds"]]
    assert content["exactness_checked"] is True
    for build, described in zip(content["builds"], INSTALLED, strict=True):
        ran = {own["backend"] for own in build["results"] if own["verdict"] == "ok"}
        assert ran >= {"causal", "packed", "two_pass"}
        assert ("varlen" in ran) is described.varlen_mask
        assert ("native" in ran) is (described.native_refusal is None)
        timed = [own for own in build["results"] if own["speed"] is not None]
        assert {own["case"] for own in timed} == {"2 x 4096, hd128 window 1024", "2 x 4096, hd256 window 1024"}
        assert all(own["speed"]["ms"] > 0 for own in timed)
        assert len(build["probes"]) == len(PROBES)
    for build in content["builds"][1:]:
        assert any(own["agreement"] is not None for own in build["results"])


# --- the five catches ---


@pytest.mark.parametrize("name", ["chunks, hd128", "tile edges, hd128 window 40", "chunks, hd256 window 50"])
def test_the_overlapping_two_passes_are_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(backends.BACKENDS, "varlen", Player(naive_two_pass))
    assert verdict_on(CASES[name], "varlen").status == "WRONG"


WORKAROUND_SCRIPT = """
import contextlib, sys, torch
from fa4_prefixlm.tools.check.cases import CASES
from fa4_prefixlm.tools.check.judge import judge
from fa4_prefixlm.tools.check.run import run_case
from fa4_prefixlm.fa4.kernels import workarounds
module, workaround, case = sys.argv[1], sys.argv[2], CASES[sys.argv[3]]
with workarounds.disabled() if workaround == "off" else contextlib.nullcontext():
    causal, own = (run_case(case, path, module, torch.device("cuda")) for path in ("causal", "varlen"))
print(judge(case, own, causal).status, own.error)
"""


@pytest.mark.parametrize("name", ["chunks, hd256", "tile edges, hd256", "chunks, hd256 window 50"])
def test_the_list_stride_without_its_workaround_is_caught(name: str) -> None:
    """At key tiles of 80 and of 64."""
    build = next((build for build in INSTALLED if SM90_LIST_STRIDE in build.defects), None)
    if build is None:
        pytest.skip("no installed build has the defect")
    environment = {key: value for key, value in os.environ.items() if key != workers.DISK_CACHE}
    statuses = []
    for workaround in ("on", "off"):
        command_line = [sys.executable, "-c", WORKAROUND_SCRIPT, build.module, workaround, name]
        done = subprocess.run(command_line, env=environment, capture_output=True, text=True, check=True)
        statuses.append(done.stdout.split()[-2])
    assert statuses == ["ok", "WRONG"]


@pytest.mark.parametrize("build", INSTALLED, ids=lambda build: build.module)
@pytest.mark.parametrize("name", PROBES)
def test_what_the_bare_build_does_is_what_its_source_tells(name: str, build: Build) -> None:
    process = workers.Worker(build.module, os.environ, "cuda")
    try:
        outcome = ProbeOutcome(**process.ask({"do": "probe", "name": name}))
    finally:
        process.close()
    known = name in {defect.name for defect in build.defects}
    assert not judge.judge_probe(outcome, build.defects, strict=False).is_bad
    assert judge.judge_probe(outcome, build.defects, strict=True).is_bad is (outcome.status in ("wrong", "raised"))
    if name in (CAUSAL_KEPT.name, SM90_LIST_STRIDE.name) and outcome.status != "skipped":
        assert outcome.status == ("wrong" if known else "right"), outcome
    if outcome.status == "wrong":
        assert judge.judge_probe(outcome, (), strict=False).status == "WRONG", "a build whose source does not tell"
    if name == PAGED_LISTS.name and known:
        assert outcome.status in ("wrong", "raised", "right")


@pytest.fixture
def _rows_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come of the torch operations, which a test can make wrong, and not of one launch."""
    rows_by_torch(monkeypatch)


@pytest.mark.usefixtures("_rows_by_torch")
@pytest.mark.parametrize("backend", MASKED)
@pytest.mark.parametrize("name", ["tile edges, hd128", "chunks, hd128 window 40", "chunks, hd256"])
def test_an_off_by_one_at_a_spans_end_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, backend: str) -> None:
    case = CASES[name]
    assert verdict_on(case, backend).status == "ok"
    right = base.row_bounds

    def one_key_short(mask, spans, lengths, where, *more, **named):
        """Rows of a span do not see its last key, which is their own for its last row, and stays."""
        bounds = right(mask, spans, lengths, where, *more, **named)
        ahead = bounds.hi > where.position[:, None] + 1
        return dataclasses.replace(bounds, hi=bounds.hi - ahead.int())

    monkeypatch.setattr(base, "row_bounds", one_key_short)
    verdict = verdict_on(case, backend)
    assert verdict.status == "WRONG"
    assert ", position " in verdict.reason


@pytest.mark.usefixtures("_rows_by_torch")
@pytest.mark.parametrize("backend", ["native", "varlen", "packed"])
@pytest.mark.parametrize("name", ["chunks, hd128", "chunks, hd256 window 50"])
def test_rows_without_the_chunk_offset_are_caught(monkeypatch: pytest.MonkeyPatch, name: str, backend: str) -> None:
    from fa4_prefixlm.kernels import token_places

    right = token_places.token_places

    def from_the_first_query(lengths):
        where = right(lengths)
        cached = lengths.cu_seqlens_k.diff() - lengths.cu_seqlens_q.diff()
        return where._replace(position=where.position - cached.index_select(0, where.sequence))

    monkeypatch.setattr(token_places, "token_places", from_the_first_query)
    assert verdict_on(CASES[name], backend).status == "WRONG"


def test_a_mask_mod_that_ignores_the_offset_of_its_sequence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import cutlass
    import cutlass.cute as cute

    from fa4_prefixlm.fa4.kernels import mask_mods

    utils = importlib.import_module(f"{INSTALLED[0].module}.utils")

    @cute.jit
    def without_offset(batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
        bounds = aux_tensors[0]
        row = utils.ssa_to_scalar(q_idx)
        kv = utils.ssa_to_scalar(kv_idx)
        lo = bounds[row, 0, 0]
        seen = cutlass.Uint32(kv - lo) < cutlass.Uint32(bounds[row, 0, 1] - lo)
        return utils.scalar_to_ssa(seen, cutlass.Boolean)

    monkeypatch.setattr(mask_mods, "varlen", lambda intervals, tagged, module: without_offset)
    verdict = verdict_on(CASES["chunks, hd128"], "varlen")
    assert verdict.status == "WRONG"


# --- the processes ---


def test_a_fork_by_path_gives_the_bits_of_the_same_build_installed(tmp_path: pathlib.Path) -> None:
    build = INSTALLED[0]
    source = locate.find_folder(build.module)
    assert source is not None
    shutil.copytree(source, tmp_path / "fork" / "flash_attn" / "cute")
    file = tmp_path / "out.json"
    options = ["--case", "hd128 window 40", "--backend", "packed", "--quiet", "--json", str(file)]
    assert command.run(["--build", build.module, "--build", str(tmp_path / "fork"), *options]) == 0
    _, fork = json.loads(file.read_text())["builds"]
    assert fork["name"] != build.name
    assert {own["verdict"] for own in fork["results"]} == {"ok"}
    assert all(own["agreement"] == {"same_bits": True, "difference": None} for own in fork["results"])


LOST_SCRIPT = """
import torch
from fa4_prefixlm.tools.check.workers import device_is_lost
device = torch.device("cuda")
print(device_is_lost(device), flush=True)
torch._assert_async(torch.zeros((), device=device).bool(), "on purpose")
print(device_is_lost(device), flush=True)
"""


def test_a_process_knows_that_its_gpu_is_lost_to_it() -> None:
    done = subprocess.run([sys.executable, "-c", LOST_SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True"]
