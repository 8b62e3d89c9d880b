"""The processes that run cases, and those who ask them. A process that dies or hangs costs one case, not the check.

Such a process, `python -m fa4_prefixlm.tools.check.workers`, runs one build. It is asked over a pipe, one JSON object a
line in, one out:

    {"do": "run", "case": NAME, "backend": NAME, "save": FILE or null}   -> an `Outcome`
    {"do": "time", "case": NAME, "backends": [NAME, ...]}                -> {"speeds": [`Speed`, ...]}
    {"do": "probe", "name": NAME}                                        -> a `ProbeOutcome`

With "ends": true in an answer, the process can go no further (its CUDA context is lost) and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from fa4_prefixlm.tools.check.cases import CASES
from fa4_prefixlm.tools.check.judge import in_short
from fa4_prefixlm.tools.check.probes import probe
from fa4_prefixlm.tools.check.run import run_case, time_case

Request = Mapping[str, Any]
Answer = dict[str, Any]

TIMEOUT = 300.0

# A kernel kept on disk, by FA4 or by this library, is not what the build compiles now.
DISK_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
NO_OWN_CACHE = {"FA4_PREFIXLM_CACHE": "0"}


class LostError(Exception):
    """The worker died or hung."""


class Worker:
    """A process that answers requests. It starts with the first request, and again after it was lost.

    build: the FA4's module. environment: in which that module is the build.
    """

    def __init__(self, build: str | None, environment: Mapping[str, str], device: str) -> None:
        self._command = [sys.executable, "-m", "fa4_prefixlm.tools.check.workers", "--device", device]
        self._command += ["--build", build] if build is not None else []
        self._environment = {name: value for name, value in environment.items() if name != DISK_CACHE} | NO_OWN_CACHE
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def ask(self, request: Request, timeout: float = TIMEOUT) -> Answer:
        """The answer to a request. Raises `LostError`, with the reason, if there is none."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, timeout)
        except LostError:
            self._end()
            raise
        except OSError:  # it ended before it read the request
            line = b""
        if not line:
            raise LostError(self._epitaph(process))
        answer: Answer = json.loads(line)
        if answer.pop("ends", False):
            self._end()
        return answer

    def close(self) -> None:
        """End the process, also while another thread waits for its answer."""
        with self._lock:
            self._closed = True
        self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise LostError("stopped")
            if self._process is None:
                self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    env=self._environment,
                )
            return self._process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], timeout: float) -> bytes:
        """An answer is written at once and whole, so the first byte is all that there is to wait for."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        if not ready:
            raise LostError(f"no answer in {timeout:.0f} s")
        return process.stdout.readline()

    def _epitaph(self, process: subprocess.Popen[bytes]) -> str:
        process.wait()
        self._errors.seek(0)
        last = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()][-1:]
        self._end()
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
        return in_short(f"the process ended with {how}: {' '.join(last) or 'no message'}")

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, self._errors):
                with contextlib.suppress(OSError):  # what was not read any more
                    if pipe is not None:
                        pipe.close()


@dataclass(frozen=True)
class Unit:
    """Requests that one worker answers in order, because they share kernels. The heaviest should start first.

    keep: the worker is needed afterwards too.
    """

    worker: Worker
    requests: Sequence[Request]
    keep: bool = False
    weight: int = 0


def ask_all(units: Sequence[Unit], jobs: int) -> Iterator[tuple[Request, Answer | LostError]]:
    """Each request of all units with its answer, as they come; at most `jobs` units at a time, in order.

    If the caller stops listening, all workers are closed.
    """
    answers: queue.SimpleQueue[tuple[Request, Answer | LostError] | BaseException] = queue.SimpleQueue()

    def run(unit: Unit) -> None:
        try:
            for request in unit.requests:
                answers.put((request, _ask(unit.worker, request)))
            if not unit.keep:
                unit.worker.close()  # it holds memory of the GPU
        except BaseException as error:
            answers.put(error)

    with ThreadPoolExecutor(max(1, jobs)) as threads:
        running = [threads.submit(run, unit) for unit in units]
        try:
            for _ in range(sum(len(unit.requests) for unit in units)):
                item = answers.get()
                if isinstance(item, BaseException):
                    raise item  # a mistake of this module, not of a worker
                yield item
        except BaseException:
            for future in running:
                future.cancel()
            for unit in units:
                unit.worker.close()
            raise


def _ask(worker: Worker, request: Request) -> Answer | LostError:
    try:
        return worker.ask(request)
    except LostError as lost:
        return lost


# --- the process itself ---


def answer(request: Mapping[str, Any], build: str | None, device: torch.device) -> dict[str, Any]:
    """What the process answers. build: the FA4's module, None for a process without one."""
    if request["do"] == "run":
        save = pathlib.Path(request["save"]) if request.get("save") else None
        return dataclasses.asdict(run_case(CASES[request["case"]], request["backend"], build, device, save))
    if request["do"] == "time":
        speeds = time_case(CASES[request["case"]], request["backends"], build, device)
        return {"speeds": [dataclasses.asdict(speed) for speed in speeds]}
    assert build is not None, "a probe is of a build"
    return dataclasses.asdict(probe(request["name"], build, device))


def device_is_lost(device: torch.device) -> bool:
    """Whether a kernel broke the CUDA context, so that all that follows fails. If not, gives free memory back."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", metavar="MODULE")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.set_num_threads(1)  # many of these processes run at once, and their work is on the GPU
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print goes to stderr
    for line in sys.stdin:
        reply = answer(json.loads(line), arguments.build, device)
        lost = device_is_lost(device)
        answers.write(json.dumps({**reply, "ends": lost}) + "\n")
        answers.flush()
        if lost:
            break


if __name__ == "__main__":
    main()
