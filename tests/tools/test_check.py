"""`fa4-prefixlm check` without a GPU: its cases, its verdicts, its processes, and that it catches what it is there for.

Wrong kernels are played by backends that compute the wrong answer on the CPU. tests/test_gpu_check.py has real ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from fa4_prefixlm.backends import select as backends
from fa4_prefixlm.backends.base import MaskedBatch
from fa4_prefixlm.fa4.builds.defects import CAUSAL_KEPT, PAGED_LISTS, SM90_LIST_STRIDE
from fa4_prefixlm.fa4.builds.describe import BEST, MASKED_ARGUMENTS
from fa4_prefixlm.fa4.builds.locate import GivenBuild, given
from fa4_prefixlm.tools.check import command, crosscheck, judge, session, workers
from fa4_prefixlm.tools.check import run as run_module
from fa4_prefixlm.tools.check.cases import CASES, EVERY, Case, cases, inputs
from fa4_prefixlm.tools.check.judge import CAUSAL, Outcome, ProbeOutcome, Speed, in_short
from fa4_prefixlm.tools.check.probes import PROBES
from fa4_prefixlm.tools.check.report import CheckReport
from fa4_prefixlm.tools.check.run import run_case
from tests.tools.played_backends import (
    Played,
    Player,
    by_bounds,
    naive_two_pass,
    one_key_short,
    one_key_too_many,
    right,
    without_chunk_offset,
)

CPU = torch.device("cpu")

QUICK = [case for case in cases() if not case.timed]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These cases are small, and threads of several test processes wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_cases_have_names_of_their_own_and_well_formed_batches() -> None:
    assert len(CASES) == len(EVERY)
    for case in EVERY:
        assert case.level in ("quick", "full")
        assert len(case.seqlens_q) == len(case.seqlens_k) == len(case.spans)
        for rows, keys, own in zip(*case.seqlens, case.spans, strict=True):
            assert rows <= keys
            ends = [0, *(edge for span in own for edge in span)]
            assert ends == sorted(ends), case.name
            assert all(start < end <= keys for start, end in own)


def test_quick_cases_need_few_kernels() -> None:
    """At 5 to 8 s each and several backends that is what the minute goes into."""
    assert len({case.kernel for case in cases()}) <= 11
    assert sum(case.timed for case in cases()) == 2
    assert set(cases()) < set(cases(full=True)) == set(EVERY)


def test_quick_cases_have_what_kernels_fail_on() -> None:
    plain = [case for case in QUICK if case.mask == "prefix_lm"]
    spans = [(case, keys - rows, keys, span) for case in plain for rows, keys, own in rows_of(case) for span in own]
    lengths = {(rows, keys) for case in plain for rows, keys, _ in rows_of(case)}
    ends = {end for *_, (_, end) in spans}
    assert {(1, 1), (0, 0), (0, 40), (1, 300)} <= lengths
    assert {edge + by for edge in (64, 80, 112, 128) for by in (-1, 0, 1)} <= ends
    assert any(span == (0, keys) and keys > 1 for _, _, keys, span in spans), "a span over the whole sequence"
    assert any(end == keys < 300 for _, _, keys, (_, end) in spans), "a span up to the last key"
    assert any(end - start == 1 for *_, (start, end) in spans), "a span of one token"
    assert any(start < first < end for _, first, _, (start, end) in spans), "a chunk that begins inside a span"
    for clamp in (True, False):
        assert any(
            case.window is not None and case.clamp is clamp and end - start > case.window
            for case, *_, (start, end) in spans
        ), "a span longer than the window"
    assert any(len(own) > 50 for case in plain for _, _, own in rows_of(case)), "many short spans"
    assert {case.kernel.group for case in QUICK} >= {2, 3, 8}
    assert {(case.head_dim, case.head_dim_v) for case in EVERY} >= {(64, 64), (128, 128), (256, 256), (192, 128)}
    assert {case.dtype for case in QUICK} == {"bfloat16", "float16"}
    assert {case.page_size for case in QUICK} == {None, 16, 128}
    assert any(case.softcap for case in QUICK)
    assert any(case.sink for case in QUICK)
    assert any(case.mask == "two intervals" for case in QUICK)


def rows_of(case: Case):
    return zip(*case.seqlens, case.spans, strict=True)


@pytest.mark.parametrize("name", ["chunks, hd128 8:1 sink pages 16", "borders, hd256"])
def test_inputs_are_the_same_bits_each_time(name: str) -> None:
    one, other = (inputs(CASES[name], CPU) for _ in range(2))
    for mine, theirs in zip(
        (one.q, one.k, one.v, *(one.cache or ())), (other.q, other.k, other.v, *(other.cache or ())), strict=True
    ):
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    assert not torch.equal(one.q, inputs(dataclasses.replace(CASES[name], name="another"), CPU).q)


def test_pages_are_of_the_keys_of_the_case() -> None:
    """tests/test_testing.py says what else they are."""
    case = CASES["chunks, hd128 8:1 sink pages 16"]
    own = inputs(case, CPU)
    keys, values = own.cache
    for row, begin, length in zip(own.table, case.cu_seqlens_k[:-1], case.seqlens_k, strict=True):
        pages = row[: -(-length // 16)].long()
        for cache, contiguous in ((keys, own.k), (values, own.v)):
            assert torch.equal(cache[pages].flatten(0, 1)[:length], contiguous[begin : begin + length])
    assert keys.isnan().any()


CASE = CASES["chunks, hd128"]

RIGHT = Outcome(CASE.name, "varlen", "ran", error=2.1e-3, row_error=3.5e-3, row_at="here", lse_error=2e-5)

BAND = dataclasses.replace(RIGHT, backend=CAUSAL, error=2e-3, row_error=3e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"error": 2.9e-3}, None),
        ({"error": 3.5e-3}, "error 0.0035"),
        ({"error": math.nan}, "error nan"),
        ({"row_error": 0.03}, "here is off by 0.03"),
        ({"row_error": math.inf}, "off by inf"),
        ({"row_error": math.nan}, "off by nan"),
        ({"lse_error": math.nan}, "LSE off by nan"),
        ({"lse_error": 1e-3}, "LSE off by 0.001"),
        ({"bad_rows": 3}, "3 rows not written"),
        ({"repeats": False}, "two runs differ"),
    ],
)
def test_what_is_wrong(change: dict, reason: str | None) -> None:
    verdict = judge.judge(CASE, dataclasses.replace(RIGHT, **change), BAND)
    assert verdict.is_bad is (reason is not None)
    assert (reason or "") in verdict.reason
    assert verdict.status == ("WRONG" if reason else "ok")


def test_a_band_is_what_the_causal_call_is_off_by() -> None:
    off = dataclasses.replace(RIGHT, error=5e-3)
    assert judge.judge(CASE, off, BAND).is_bad
    assert not judge.judge(CASE, off, dataclasses.replace(BAND, error=4e-3)).is_bad
    exact = dataclasses.replace(BAND, error=0.0, row_error=0.0, lse_error=0.0)  # a batch of one token
    assert judge.judge(CASE, RIGHT, exact) == judge.judge(CASE, RIGHT, None)
    assert not judge.judge(CASE, RIGHT, exact).is_bad


def test_a_causal_call_that_is_wrong_is_no_band() -> None:
    broken = dataclasses.replace(BAND, error=0.4, row_error=1.0, lse_error=1.0)
    assert judge.judge(CASE, broken, broken).is_bad
    assert not judge.judge(CASE, BAND, BAND).is_bad
    assert judge.judge(CASE, dataclasses.replace(RIGHT, error=0.1), broken).is_bad


def test_float16_is_held_to_an_eighth() -> None:
    half = dataclasses.replace(CASE, dtype="float16")
    assert judge.judge(half, RIGHT, None).is_bad
    assert not judge.judge(half, dataclasses.replace(RIGHT, error=2.4e-4, row_error=4e-4), None).is_bad


@pytest.mark.parametrize("status", ["refused", "failed", "compiled"])
def test_what_did_not_run(status: str) -> None:
    verdict = judge.judge(CASE, Outcome(CASE.name, "native", status, "why"), BAND)
    assert (verdict.status, verdict.reason, verdict.is_bad) == (status, "why", status == "failed")


def test_builds_agree_within_both_limits() -> None:
    fine = judge.judge(CASE, RIGHT, BAND)
    same = judge.Agreement(True)
    assert judge.judge_agreement(fine, fine, same) is fine
    assert judge.judge_agreement(fine, fine, judge.Agreement(False, 3e-3)) is fine
    assert fine.limits is not None
    both = 2 * fine.limits.error
    assert judge.judge_agreement(fine, fine, judge.Agreement(False, 0.99 * both)) is fine
    assert judge.judge_agreement(fine, fine, judge.Agreement(False, 1.01 * both)).is_bad
    out, lse = torch.randn(10, 2, 64), torch.randn(2, 10)
    assert judge.compare((out, lse), (out.clone(), lse.clone())) == same
    assert judge.compare((out, lse), (out * 1.01, lse)).difference == pytest.approx(0.0099, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "status", "known", "verdict", "strict"),
    [
        (CAUSAL_KEPT.name, "right", (), "ok", "ok"),
        (CAUSAL_KEPT.name, "right", (CAUSAL_KEPT,), "ok", "ok"),
        (CAUSAL_KEPT.name, "wrong", (CAUSAL_KEPT,), "defect", "WRONG"),
        (CAUSAL_KEPT.name, "wrong", (SM90_LIST_STRIDE,), "WRONG", "WRONG"),
        (CAUSAL_KEPT.name, "raised", (), "refused", "failed"),
        (PAGED_LISTS.name, "raised", (PAGED_LISTS,), "defect", "WRONG"),
        (PAGED_LISTS.name, "skipped", (), "skipped", "skipped"),
    ],
)
def test_a_bare_build(name: str, status: str, known: tuple, verdict: str, strict: str) -> None:
    outcome = ProbeOutcome(name, status, "why", 0.5 if status == "wrong" else None)
    assert judge.judge_probe(outcome, known, strict=False).status == verdict
    assert judge.judge_probe(outcome, known, strict=True).status == strict


def played(monkeypatch: pytest.MonkeyPatch, compute, case: Case) -> judge.Verdict:
    monkeypatch.setitem(backends.BACKENDS, "varlen", Player(compute))
    outcome = run_case(case, "varlen", None, CPU)
    assert outcome.status == "ran", outcome.reason
    return judge.judge(case, outcome, causal_of(case))


@functools.cache
def causal_of(case: Case) -> Outcome:
    return run_case(case, CAUSAL, None, CPU)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_a_right_backend_passes(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    verdict = played(monkeypatch, right, case)
    assert (verdict.status, verdict.reason) == ("ok", "")


PLAIN = [case for case in QUICK if case.mask == "prefix_lm"]


@pytest.mark.slow
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_an_off_by_one_at_a_spans_end_is_caught(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    verdict = played(monkeypatch, one_key_short, case)
    assert verdict.status == "WRONG"
    assert ", position " in verdict.reason, "it says where"
    assert played(monkeypatch, one_key_too_many, case).status == "WRONG"


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in PLAIN if not case.softcap and not case.sink], ids=lambda c: c.name)
def test_the_overlapping_two_passes_are_caught(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    assert played(monkeypatch, naive_two_pass, case).status == "WRONG"


@pytest.mark.parametrize("case", [case for case in PLAIN if "chunks" in case.name], ids=lambda case: case.name)
def test_a_mask_without_the_chunk_offset_is_caught(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    assert played(monkeypatch, without_chunk_offset, case).status == "WRONG"


def test_an_off_by_one_of_one_row_is_caught_where_the_whole_output_looks_right(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["tile edges, hd128"]

    def one_row(work: MaskedBatch, q, k, v, options):
        hi = work.bounds.hi.clone()
        hi[370] -= 1
        assert hi[370] > 370
        return by_bounds(work, dataclasses.replace(work.bounds, hi=hi), q, k, v, options)

    monkeypatch.setitem(backends.BACKENDS, "varlen", Player(one_row))
    outcome = run_case(case, "varlen", None, CPU)
    verdict = judge.judge(case, outcome, None)
    assert outcome.error <= verdict.limits.error
    assert verdict.status == "WRONG"
    assert "sequence 0, position 370" in verdict.reason


def test_a_row_is_named_by_its_sequence_and_position() -> None:
    """Of 100 queries on 600 keys, 64 on 512, and 1 on 300: the queries are the last positions."""
    assert CASE.seqlens_q[:3] == (100, 64, 1)
    assert CASE.seqlens_k[:3] == (600, 512, 300)
    for row, place in (
        (0, "0, position 500"),
        (99, "0, position 599"),
        (100, "1, position 448"),
        (164, "2, position 299"),
    ):
        assert run_module._where(CASE, row, 3) == f"sequence {place}, head 3"


def test_an_output_that_is_not_written_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(Played):
        def run(self, q, k, v, options, out):
            result, lse = right(self.work, q, k, v, options)
            out[:-3] = result[:-3].to(q.dtype)
            return out, lse

    class LazyPlayer(Player):
        def prepare(self, work):
            return Lazy(work, right)

    monkeypatch.setitem(backends.BACKENDS, "varlen", LazyPlayer(right))
    outcome = run_case(CASE, "varlen", None, CPU)
    assert outcome.bad_rows == 3
    assert judge.judge(CASE, outcome, None).status == "WRONG"


def test_refusals_and_errors_are_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = run_case(CASE, "native", None, CPU)
    assert (refused.status, refused.reason) == ("refused", "FA4 needs a GPU, the tensors are on cpu")

    def broken(*_):
        raise RuntimeError("CUDA error in /home/someone/fork/kernel.py\nmore")

    monkeypatch.setitem(backends.BACKENDS, "varlen", Player(broken))
    failed = run_case(CASE, "varlen", None, CPU)
    assert (failed.status, failed.reason) == ("failed", "RuntimeError: CUDA error in kernel.py")


def test_reports_hold_no_folders() -> None:
    assert in_short(ValueError("in /home/a/b.c/d.py: 3/4 of it")) == "ValueError: in d.py: 3/4 of it"
    assert in_short("\n\n first \n second") == "first"
    assert in_short(ValueError()) == "ValueError:"
    assert in_short("\x1b[31mno\x1b[0m\x07 kernel") == "no kernel"


INTERFACE = """
import os
import torch
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.backends.reference import attend

print("a compiler that talks")
os.write(1, b"[and how]\\n")


def _flash_attn_fwd(q, k, v, {arguments}):
    assert q.ndim == 3
    bounds, kv = aux_tensors[0][: len(q)], torch.arange(len(k))
    visible = (kv >= bounds[:, 0, 0, None]) & (kv < bounds[:, 0, 1, None])
    if causal and {overrides}:
        visible = kv <= torch.arange(len(q))[:, None]
    out, lse = attend(q.float(), k.float(), v.float(), visible, Options(softmax_scale, 0.0, None))
    return out.to(q.dtype), lse


def _resolve_causal_local_window(causal, window_size_left, window_size_right, mask_mod=None):
    return causal and {told}, False, window_size_left, window_size_right


def _validate_head_dims(head_dim, head_dim_v, compute_capability, alignment):
    pass
"""


def write_fork(folder: pathlib.Path, *, overrides: bool, told: bool) -> pathlib.Path:
    cute = folder / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    names = sorted(MASKED_ARGUMENTS - {"q", "k", "v"})
    arguments = ", ".join(f"{name}=None" for name in names)
    (cute / "__init__.py").touch()
    (cute / "utils.py").touch()
    (cute / "interface.py").write_text(INTERFACE.format(arguments=arguments, overrides=overrides, told=told))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "told", "verdict"), [(False, False, "ok"), (True, False, "WRONG"), (True, True, "defect")]
)
def test_a_build_whose_causal_overrides_the_mask_mod(
    tmp_path: pathlib.Path, overrides: bool, told: bool, verdict: str
) -> None:
    """By path, in a process of its own, whose prints do not get into the answers."""
    pytest.importorskip("cutlass", reason="the mask_mods are CuTe code")
    fork = given(str(write_fork(tmp_path / "fork", overrides=overrides, told=told)))
    process = workers.Worker(fork.module, fork.environment(tmp_path / "links"), "cpu")
    try:
        answer = process.ask({"do": "probe", "name": CAUSAL_KEPT.name})
    finally:
        process.close()
    outcome = ProbeOutcome(**answer)
    assert outcome.status == ("wrong" if overrides else "right"), outcome.reason
    assert outcome.error > 0.1 if overrides else outcome.error < 3e-3
    judged = judge.judge_probe(outcome, fork.describe().defects, strict=False)
    assert judged.status == verdict
    assert judged.is_bad is (verdict == "WRONG")


def test_there_is_a_probe_for_each_defect_that_gives_wrong_answers() -> None:
    assert set(PROBES) == {CAUSAL_KEPT.name, SM90_LIST_STRIDE.name, PAGED_LISTS.name}


def stub(code: str) -> workers.Worker:
    process = workers.Worker(None, os.environ, "cpu")
    process._command = [sys.executable, "-c", code]
    return process


ANSWER = """
import sys, json
for line in sys.stdin:
    print(json.dumps({"got": json.loads(line), "ends": False}), flush=True)
"""


def test_a_worker_that_dies_says_why_and_starts_again(tmp_path: pathlib.Path) -> None:
    seen = tmp_path / "seen"
    process = stub(
        f"import os, sys, pathlib\nseen = pathlib.Path({str(seen)!r})\n"
        "if not seen.exists():\n"
        "    sys.stdin.readline(); seen.touch(); print('/some/where/x.cu: illegal access', file=sys.stderr)\n"
        f"    sys.stderr.flush(); os.abort()\n{ANSWER}"
    )
    with pytest.raises(workers.LostError, match="signal 6: x.cu: illegal access"):
        process.ask({"do": "run"})
    assert process.ask({"do": "run"}) == {"got": {"do": "run"}}
    process.close()


def test_a_worker_that_hangs_is_ended() -> None:
    process = stub("import time; time.sleep(100)")
    began = time.monotonic()
    with pytest.raises(workers.LostError, match="no answer in 1 s"):
        process.ask({"do": "run"}, timeout=1)
    assert time.monotonic() - began < 10
    process.close()
    with pytest.raises(workers.LostError, match="stopped"):
        process.ask({"do": "run"})


def test_whoever_stops_listening_ends_the_workers() -> None:
    units = [workers.Unit(stub(ANSWER), [{"n": 1}]), workers.Unit(stub("import time; time.sleep(100)"), [{"n": 2}])]
    answers = workers.ask_all(units, jobs=2)
    assert next(answers) == ({"n": 1}, {"got": {"n": 1}})
    answers.close()
    assert all(unit.worker._process is None for unit in units)


@pytest.mark.slow
def test_a_worker_answers_as_the_function_does() -> None:
    environment = {**os.environ, workers.DISK_CACHE: "1"}
    process = workers.Worker(None, environment, "cpu")
    assert workers.DISK_CACHE not in process._environment
    request = {"do": "run", "case": "chunks, hd128", "backend": "reference", "save": None}
    try:
        theirs, refused = process.ask(request), process.ask({**request, "backend": "packed"})
    finally:
        process.close()
    mine = workers.answer(request, None, CPU)
    assert {**theirs, "seconds": 0} == {**mine, "seconds": 0}
    assert refused["status"] == "refused"


def test_cases_that_share_kernels_share_a_process() -> None:
    wanted = session.Wanted(cases(), jobs=16)
    asked = session.requests(0, wanted, None, probes=True)
    team = session.team(asked, wanted, 16, lambda: workers.Worker(None, {}, "cpu"))
    assert sorted(map(id, asked)) == sorted(id(request) for unit in team.units for request in unit.requests)
    assert len(team.units) <= 17
    places: dict[tuple, set[int]] = {}
    for index, unit in enumerate(team.units):
        assert unit.keep is (unit.worker in team.timed.values())
        for request in unit.requests:
            if request["do"] == "run" and not unit.keep:
                places.setdefault((request["backend"], CASES[request["case"]].kernel), set()).add(index)
    assert {len(own) for own in places.values()} == {1}
    assert set(team.timed) == {case.name for case in cases() if case.timed}
    first = next(unit for unit in team.units if unit.worker is team.timed["2 x 4096, hd128 window 1024"])
    assert [request["backend"] for request in first.requests] == list(session.CHECKED)


class InProcess:
    """Answers like a worker, where the backends of this process are the played ones."""

    def __init__(self, build, environment, device) -> None:
        self.device = torch.device(device)

    def ask(self, request, timeout=0.0):
        if request["backend"] == "two_pass":
            raise workers.LostError("the process ended with signal 9: no message")
        return json.loads(json.dumps(workers.answer(request, None, self.device)))

    def close(self) -> None:
        pass


def build_named(name: str) -> session.CheckedBuild:
    own = GivenBuild("flash_attn.cute", pathlib.Path("/nowhere"), installed=True)
    return session.CheckedBuild(own, dataclasses.replace(BEST, name=name))


def checked(monkeypatch: pytest.MonkeyPatch, compute, names=("one",), **wanted) -> list[session.BuildResults]:
    monkeypatch.setattr(session, "Worker", InProcess)
    monkeypatch.setitem(backends.BACKENDS, "varlen", Player(compute))
    some = [CASES["chunks, hd128"], CASES["tile edges, hd128 window 40"]]
    return session.check([build_named(name) for name in names], session.Wanted(some, **wanted), CPU)


MOST = ("native", "varlen", "reference")


def test_a_session_judges_every_case_on_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    progress = session.Progress(lambda count: events.append(count), lambda what: events.append(what))
    monkeypatch.setattr(session, "Worker", InProcess)
    monkeypatch.setitem(backends.BACKENDS, "varlen", Player(right))
    (report,) = session.check([build_named("one")], session.Wanted([CASE], MOST), CPU, progress)
    assert [(own.outcome.backend, own.verdict.status) for own in report.results] == [
        ("causal", "ok"),
        ("native", "refused"),
        ("varlen", "ok"),
        ("reference", "ok"),
    ]
    assert not report.is_bad
    assert events == [4, *(f"{CASE.name}, {name}" for name in (CAUSAL, *MOST))]


def test_a_lost_worker_is_a_failure_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    (report,) = checked(monkeypatch, right, backends=("two_pass", "varlen"))
    statuses = {own.outcome.backend: own.verdict for own in report.results}
    assert statuses["two_pass"].status == "failed"
    assert "signal 9" in statuses["two_pass"].reason
    assert statuses["varlen"].status == "ok"
    assert report.is_bad


def test_builds_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = checked(monkeypatch, right, ("one", "two"), backends=MOST)
    assert all(own.agreement is None for own in first.results)
    assert [own.outcome.backend for own in second.results] == ["causal", "native", "varlen"] * 2
    assert {own.outcome.backend: own.agreement for own in second.results if own.agreement} == {
        "causal": judge.Agreement(True),
        "varlen": judge.Agreement(True),
    }
    assert not second.is_bad


def test_builds_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def changing(work: MaskedBatch, q, k, v, options):
        """Each case runs twice in a build; the second build's outputs are off by less than the rounding."""
        out, lse = right(work, q, k, v, options)
        return out * (1 + 1e-3 * (next(calls) >= 4)), lse

    _, second = checked(monkeypatch, changing, ("one", "two"), backends=("varlen",))
    own = next(own for own in second.results if own.outcome.backend == "varlen")
    assert own.agreement is not None
    assert not own.agreement.same_bits
    assert 5e-4 < own.agreement.difference < 4e-3
    assert own.verdict.status == "ok"


def a_report(monkeypatch: pytest.MonkeyPatch, compute=right) -> CheckReport:
    builds = checked(monkeypatch, compute, ("one", "two"), backends=(*MOST, "two_pass"))
    first = builds[0]
    probes = [
        (ProbeOutcome(PAGED_LISTS.name, "wrong", "", 1.2), judge.Verdict("defect", "error 1.2; avoided")),
        (ProbeOutcome(CAUSAL_KEPT.name, "wrong", "", math.inf), judge.Verdict("WRONG", "error inf")),
    ]
    results = list(first.results)
    speed = Speed(results[2].case.name, "varlen", 0.25, 300.0, 0.4, 0.01)
    results[2] = dataclasses.replace(results[2], speed=speed)
    builds[0] = dataclasses.replace(first, probes=probes, results=results, troubles=["timing: lost"])
    return CheckReport("quick", builds)


def test_the_table_names_what_is_wrong_and_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = str(a_report(monkeypatch, one_key_short))
    assert "one (flash_attn.cute), the first build" in text
    assert "two, tile edges, hd128 window 40, varlen: WRONG, " in text
    assert "bare build, causal-over-mask-mod: WRONG, error inf" in text
    assert "one, native: FA4 needs a GPU, the tensors are on cpu (2 cases)" in text
    assert "slower than 0.5 of FA4 causal" in text
    assert "same bits" in text
    assert "one: 4 ok, 2 refused, 2 WRONG, 2 failed, 1 known defect of the bare build, 2 more wrong or failed" in text
    assert all(len(line) < 200 for line in text.splitlines())


def test_json_is_json_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = json.dumps(a_report(monkeypatch).as_json())
    content = json.loads(text, parse_constant=reject)
    assert content["ok"] is False
    assert content["versions"]["torch"] == importlib.metadata.version("torch")
    first, second = content["builds"]
    assert [probe["error"] for probe in first["probes"]] == [1.2, "inf"]
    own = first["results"][2]
    assert (own["backend"], own["verdict"], own["speed"]["of_causal"]) == ("varlen", "ok", 0.4)
    assert own["error"] < own["limits"]["error"]
    assert second["results"][0]["agreement"] == {"same_bits": True, "difference": None}
    assert "/nowhere" not in text
    assert str(pathlib.Path.home()) not in text


def test_junit_has_a_suite_per_build(monkeypatch: pytest.MonkeyPatch) -> None:
    suites = ElementTree.fromstring(a_report(monkeypatch, one_key_short).as_junit())
    first, second = suites
    assert (first.tag, first.get("name")) == ("testsuite", "one")
    counts = {name: int(first.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": 13, "failures": 3, "errors": 3, "skipped": 3}
    for kind, count in (("failure", 3), ("error", 3), ("skipped", 3)):
        assert len(first.findall(f"testcase/{kind}")) == count
    assert "position" in first.find("testcase/failure").get("message")
    assert second.get("tests") == "8"


def exit_status(monkeypatch: pytest.MonkeyPatch, compute, *options: str) -> int:
    monkeypatch.setattr(session, "Worker", InProcess)
    monkeypatch.setitem(backends.BACKENDS, "varlen", Player(compute))
    monkeypatch.setattr(command, "_builds", lambda texts: [build_named("one")])
    monkeypatch.setattr(
        command, "crosscheck", lambda builds, wanted, progress: session.check(builds, wanted, CPU, progress)
    )
    return command.run(["--case", "chunks, hd128 window 40", "--quiet", "--jobs", "1", *options])


def test_exit_statuses(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys) -> None:
    assert exit_status(monkeypatch, right, "--backend", "varlen") == 0
    files = [tmp_path / "out.json", tmp_path / "out.xml"]
    written = ("--json", str(files[0]), "--junit", str(files[1]))
    assert exit_status(monkeypatch, one_key_short, "--backend", "varlen", *written) == 1
    assert "WRONG" in capsys.readouterr().out
    assert json.loads(files[0].read_text())["ok"] is False
    assert ElementTree.parse(files[1]).getroot().tag == "testsuites"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "no such case"], "--case"),
        (["--build", "no.such.module"], "build"),
        (["--build", "."], "a checkout"),
        (["--jobs", "0"], "--jobs"),
        (["--json", "no/such/folder/out.json"], "--json"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys) -> None:
    pytest.importorskip("flash_attn", reason="flash-attn-4 is not installed")
    assert command.run([*options, "--quiet"]) == 2
    assert message in capsys.readouterr().err


def test_no_build_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(command, "all_installed", list)
    assert command.run(["--quiet"]) == 2
    assert "an installed FA4" in capsys.readouterr().err


def test_a_check_where_all_is_refused_is_none(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def judged(*names: str) -> bool:
        return CheckReport("quick", checked(monkeypatch, right, backends=names)).exactness_checked

    assert not judged("native", "reference"), "only the causal call ran, which is there for its error band"
    assert judged("native", "varlen")
    assert judged("causal")
    assert exit_status(monkeypatch, right, "--backend", "native") == 2
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("NOT JUDGED: no output of FlashAttention-4; every case was refused.")


def test_the_last_line_says_what_was_judged(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    exit_status(monkeypatch, right, "--backend", "varlen")
    assert (
        capsys.readouterr().out.splitlines()[-1] == "RIGHT: 2 outputs were judged against float64, and none is wrong."
    )
    exit_status(monkeypatch, one_key_short, "--backend", "varlen")
    assert capsys.readouterr().out.splitlines()[-1] == "NOT RIGHT: 1 wrong or failed, listed above."


def test_json_in_place_of_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys) -> None:
    for option in (["--json"], ["--json", "-"]):
        exit_status(monkeypatch, right, "--backend", "varlen", *option)
        assert json.loads(capsys.readouterr().out)["ok"] is True
    exit_status(monkeypatch, right, "--backend", "varlen", "--json", str(tmp_path / "out.json"))
    assert "RIGHT" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["ok"] is True


def compiles_nothing(monkeypatch: pytest.MonkeyPatch, error: str | None = None) -> None:
    """Play a compiler, and a machine with an FA4 but without a GPU."""

    def compile_in_subprocess(arch, variants, *, build, environment, done):
        reports = [{**dataclasses.asdict(own), "kernel": "k", "error": error, "seconds": 1.0} for own in variants]
        for report in reports:
            done(report)
        return reports

    monkeypatch.setattr(crosscheck, "compile_in_subprocess", compile_in_subprocess)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "_builds", lambda texts: [build_named("one")])


ONE_CASE = ["--case", "chunks, hd128 window 40", "--jobs", "1"]


@pytest.mark.parametrize(
    ("options", "status", "last"),
    [
        (
            ["--backend", "native"],
            2,
            "NOT JUDGED: no output of FlashAttention-4; the kernels of 2 calls were compiled for Hopper and not run "
            "(there is no GPU here). The reference was not run either.",
        ),
        (
            ["--backend", "native", "--backend", "reference"],
            2,
            "NOT JUDGED: no output of FlashAttention-4; the kernels of 2 calls were compiled for Hopper and not run "
            "(there is no GPU here). The reference, which does not use it, was judged here: 1 case, right.",
        ),
        (
            ["--compile-only", "--backend", "native", "--backend", "reference"],
            0,
            "NOT JUDGED: no output of FlashAttention-4; the kernels of 2 calls were compiled for Hopper and not run "
            "(--compile-only). The reference was not run either.",
        ),
    ],
)
def test_compiled_is_not_judged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, options: list[str], status: int, last: str, capsys
) -> None:
    compiles_nothing(monkeypatch)
    file = tmp_path / "out.json"
    assert command.run([*ONE_CASE, "--quiet", *options, "--json", str(file)]) == status
    assert capsys.readouterr().out.splitlines()[-1] == last
    content = json.loads(file.read_text())
    assert (content["ok"], content["exactness_checked"]) == (None, False)


@pytest.mark.parametrize("options", [[], ["--compile-only"]])
def test_what_does_not_compile_is_not_right(monkeypatch: pytest.MonkeyPatch, options: list[str], capsys) -> None:
    compiles_nothing(monkeypatch, error="DSLRuntimeError: no")
    assert command.run([*ONE_CASE, "--quiet", "--backend", "native", *options, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_compiling_alone_runs_nothing_on_a_gpu_either(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    compiles_nothing(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "describe_machine", lambda: None, raising=False)
    monkeypatch.setattr(command, "check", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(CheckReport, "as_json", lambda self: {})
    monkeypatch.setattr(CheckReport, "__str__", CheckReport.conclusion)
    assert command.run([*ONE_CASE, "--quiet", "--backend", "native", "--compile-only"]) == 0
    assert "(--compile-only)" in capsys.readouterr().out


def test_a_line_for_each_case_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    compiles_nothing(monkeypatch)
    command.run([*ONE_CASE, "--backend", "native", "--backend", "reference"])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[1/2] causal, head dim 128: compiled (1.0 s)",
        "[2/2] native, head dim 128: compiled (1.0 s)",
        "[3/3] chunks, hd128 window 40, reference on the CPU",
    ]
    command.run([*ONE_CASE, "--backend", "native", "--quiet"])
    assert capsys.readouterr().err == ""


def test_cases_that_share_kernels_are_compiled_once() -> None:
    wanted = session.Wanted(cases(), backends=("varlen",))
    variants = {crosscheck.variant_of(case, "varlen") for case in wanted.cases}
    assert len(variants) == len({case.kernel for case in cases()})
    assert crosscheck.variant_of(CASES["prompts, hd128 two intervals"], CAUSAL).mask == "prefix_lm"
    assert {variant.mask for variant in variants} == {"prefix_lm", "two"}


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_what_is_compiled_is_the_kernel_of_the_case(case: Case) -> None:
    variant, kernel = crosscheck.variant_of(case, "varlen"), case.kernel
    assert variant.backend == "varlen"
    assert (variant.head_dim, variant.head_dim_v) == kernel.dims
    assert variant.heads[0] == kernel.group * variant.heads[1]
    assert (variant.window is not None, variant.sink) == (kernel.windowed, kernel.sink is not None)
    assert (variant.dtype, variant.softcap, variant.page_size) == (kernel.dtype, kernel.softcap, kernel.page_size)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would run")
def test_a_fork_by_path_is_compiled_where_there_is_no_gpu(tmp_path: pathlib.Path, capsys) -> None:
    flash_attn = pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    copies = [tmp_path / name / "flash_attn" / "cute" for name in ("fork", "broken")]
    for copy in copies:
        shutil.copytree(pathlib.Path(flash_attn.__file__).parent, copy)
    with (copies[1] / "flash_fwd_sm90.py").open("a") as file:
        file.write("\n\ndel FlashAttentionForwardSm90.mma\n")
    files = {name: tmp_path / f"{name}.json" for name in ("fork", "broken")}
    options = ["--case", "chunks, hd128 window 40", "--backend", "varlen", "--backend", "reference", "--quiet"]

    def run(name: str) -> int:
        return command.run(["--build", str(tmp_path / name), *options, "--json", str(files[name])])

    assert (run("fork"), run("broken")) == (2, 1)
    said = capsys.readouterr().out
    assert "NOT JUDGED: no output of FlashAttention-4" in said
    assert "was judged here: 1 case, right" in said
    assert "varlen: not run (1 case)" in said
    fork, broken = (json.loads(file.read_text()) for file in files.values())
    assert fork["exactness_checked"] is False
    assert [(own["backend"], own["verdict"]) for own in fork["builds"][0]["results"]] == [
        ("causal", "compiled"),
        ("varlen", "compiled"),
        ("reference", "ok"),
    ]
    assert fork["builds"][0]["module"] == "flash_attn.cute"
    assert {own["verdict"] for own in broken["builds"][0]["results"]} == {"failed", "ok"}
    assert str(tmp_path) not in json.dumps(broken)


@pytest.mark.slow
def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fa4_prefixlm.tools.check", "--help"], capture_output=True, text=True, check=True
    )
    assert "--strict" in done.stdout
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert parser.parse_args([]).jobs == (os.cpu_count() or 1)
