"""Time to first token, decoding and host time in vLLM: the `time` of `vllm_engine.py`.

Widths of Gemma 3 4B and of Gemma 4, six layers (five local, one global). All backends' engines are up at once on one
GPU and take turns: each round times every workload on every backend, in another order, while the processes of the
others are stopped. All do their host's work on the same few cores. Times are wall clock: the median of the rounds, and
their spread. A backend can be named twice, as `FLASH_ATTN FLASH_ATTN:again`: two engines of one code, which differ by
what wall clock can't tell here.

- first token: one request, or eight mixed ones, until all have their first token; nothing is in the prefix cache.
- decode: tokens a second of all requests, at the median of the steps in which all of them decode; microseconds of a
  step in the fastest four in a row, whose best round is what a host alone with the engine would give; and the calls of
  functions, Python's and C's, in a step of the whole engine: what a backend adds to the host's work, wherever it does,
  and the same number on a slow host.
- GPU: what the GPU works in the prefill of all requests, and in one decoding step of them: the sum of its kernels and
  copies as torch's profiler has them. With the host's time, this says what a backend adds where wall clock is too
  noisy to.
- host: what a step spends in the backend's own Python, its builders and its layers, in decoding and in steps that
  each prefill an image beside seven requests that decode, the median of them. Of the layers only what is not in a CUDA
  graph.
"""

from __future__ import annotations

import argparse
import collections
import cProfile
import dataclasses
import itertools
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch

from fa4_prefixlm.testing.tables import columns
from fa4_prefixlm.testing.timing import gpu_busy, profile_gpu

OURS = "FA4_PREFIXLM"
LEAST, MOST = 3, 20  # rounds
CORES = 4  # for what an engine's main thread does
IN_A_ROW = 4  # decoding steps: a single one can be short because the one before it was late
# Per model: a checkpoint's shape, and pixels of an image, which gives 256 tokens.
_COMMON = {"heads": 8, "kv_heads": 4, "head_dim": 256, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
SHAPES: dict[str, dict[str, Any]] = {
    "gemma3": {
        **_COMMON,
        **{"hidden": 2560, "intermediate": 10240, "window": 1024, "image_size": 224, "image_tokens": 256},
    },
    "gemma4": {
        **_COMMON,
        **{"hidden": 2304, "intermediate": 9216, "window": 512, "global_head_dim": 512, "soft_tokens": 280},
    },
}
PIXELS = 224
TINY_PIXELS = 112


@dataclasses.dataclass(frozen=True)
class Steps:
    """How many of each kind are measured.

    decoding: of a request, timed. profiled: of them, for the GPU's work. settling, host: of them, for the host's time.
    counted: after them, for the calls of functions. mixed: that prefill an image.
    """

    decoding: int = 64
    profiled: int = 16
    settling: int = 8
    host: int = 24
    counted: int = 8
    mixed: int = 6


TINY_STEPS = Steps(decoding=12, profiled=2, settling=1, host=2, counted=1, mixed=1)


@dataclasses.dataclass(frozen=True)
class Workload:
    """requests: (tokens, images) of each. what: "first token", "decode", "GPU" or "host"."""

    what: str
    requests: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """For people."""
        if len(set(self.requests)) > 1:
            return f"{self.what}, {len(self.requests)} mixed"
        tokens, images = self.requests[0]
        return f"{self.what}, {len(self.requests)} x {tokens} tokens, {images} images"


_MIXED = ((512, 1), (1024, 0), (2048, 4), (4096, 8), (512, 0), (1024, 2), (2048, 0), (4096, 1))
WORKLOADS = (
    *(Workload("first token", ((4096, images),)) for images in (0, 1, 8)),
    *(Workload("first token", ((8192, images),)) for images in (0, 1, 8)),
    *(Workload("first token", ((16384, images),)) for images in (0, 1, 8, 32)),
    *(Workload("first token", ((32768, images),)) for images in (0, 1, 8, 32)),
    Workload("first token", _MIXED),
    Workload("decode", ((4096, 0),)),
    Workload("decode", ((16384, 0),)),
    Workload("decode", ((16384, 8),)),
    Workload("decode", ((4096, 1),) * 8),
    Workload("decode", _MIXED),
    *(Workload("GPU", ((16384, images),)) for images in (0, 8)),
    *(Workload("GPU", ((4096, images),) * 8) for images in (0, 1)),
    Workload("host", ((2048, 1),) * 8),
)
TINY = (
    Workload("first token", ((256, 0),)),
    Workload("first token", ((512, 2),)),
    Workload("decode", ((256, 1), (128, 0))),
    Workload("GPU", ((256, 1), (128, 0))),
    Workload("host", ((160, 1),) * 4),
)


def time_all(arguments: argparse.Namespace, folder: pathlib.Path) -> tuple[dict[str, Any], bool]:
    """(what was measured, whether every backend has a time for every workload)."""
    results, failed, end = [], [], time.monotonic() + arguments.total
    workloads = tuple(
        own for own in (TINY if arguments.cpu else WORKLOADS) if any(text in own.name for text in arguments.only)
    )
    for kind in arguments.models:
        _make(kind, folder, arguments.cpu)
        engines = _start(kind, arguments, folder)
        failed += [f"{kind} {name}: did not start" for name in arguments.backends if name not in engines]
        samples = _measure(engines, workloads, arguments.seconds, end)
        for engine in engines.values():
            engine.stop()
        for workload in workloads:
            for name in arguments.backends:
                own = samples.get((workload, name), [])
                if own:
                    results.append({"model": kind, "workload": workload.name, "backend": name, **_summary(own)})
                elif name in engines:
                    failed.append(f"{kind} {name}: {workload.name}: no time")
    _show(results)
    for line in failed:
        print(f"FAILED: {line}")
    content = {"failed": failed, "mode": arguments.modes[0], "layers": 6, "image tokens": 256, "results": results}
    return content, not failed


def _make(kind: str, folder: pathlib.Path, cpu: str) -> None:
    from tests.integrations.vllm_engine import models

    dtype = torch.float32 if cpu else torch.bfloat16
    models.make(kind, folder / kind, dtype=dtype, **({} if cpu else SHAPES[kind]))


class Engine:
    """A process with one engine, which answers `(workload, seed)` with a dictionary of measured values."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection, log: pathlib.Path) -> None:
        self._process, self._connection, self._log = process, connection, log
        self.alive = True

    def ask(self, workload: Workload, seed: int, timeout: float) -> dict[str, float] | None:
        """None, and never alive again, if there is no answer."""
        if self.alive:
            try:
                self._process.send_signal(signal.SIGCONT)
                self._connection.send((workload, seed))
                if self._connection.poll(timeout):
                    answer: dict[str, float] = self._connection.recv()
                    self.pause()
                    return answer
            except (EOFError, OSError):
                pass
            print(f"{workload.name}: no answer\n    " + _end_of(self._log), flush=True)
            self.stop()
        return None

    def pause(self) -> None:
        """Leave the host's cores to the others until the next question."""
        if self.alive:
            self._process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        """End the process."""
        self.alive = False
        self._process.kill()
        self._process.wait()


def _start(kind: str, arguments: argparse.Namespace, folder: pathlib.Path) -> dict[str, Engine]:
    """The engines that came up, by backend."""
    from tests.integrations.vllm_engine.engine import Job

    began, engines = time.monotonic(), {}
    with Listener(str(folder / f"{kind}.socket"), "AF_UNIX") as listener:
        processes = {}
        for name in arguments.backends:
            job = Job(
                folder=str(folder / kind),
                result="",
                backend=name.partition(":")[0],
                mode=arguments.modes[0],
                cpu=arguments.cpu,
                tensor_parallel=arguments.tensor_parallel,
            )
            log = folder / f"time-{kind}-{name}.log"
            processes[name] = job.start(log, [__file__, str(listener.address), name]), log
        waiting = dict(processes)
        while waiting and time.monotonic() - began < arguments.timeout:
            accepted = _accept(listener)
            if accepted is not None:
                name = accepted.recv()
                engines[name] = Engine(waiting.pop(name)[0], accepted, processes[name][1])
                print(f"{kind} {name}: up after {time.monotonic() - began:.0f} s", flush=True)
            for name, (process, log) in list(waiting.items()):
                if process.poll() is not None:
                    del waiting[name]
                    print(f"{kind} {name}: exit {process.returncode}\n    " + _end_of(log), flush=True)
        for process, _ in waiting.values():
            process.kill()
    for engine in engines.values():
        engine.pause()
    return engines


def _accept(listener: Listener) -> Connection | None:
    listener._listener._socket.settimeout(0.5)  # type: ignore[attr-defined]
    try:
        return listener.accept()
    except TimeoutError:
        return None


def _measure(
    engines: dict[str, Engine], workloads: tuple[Workload, ...], seconds: float, end: float
) -> dict[tuple[Workload, str], list[dict[str, float]]]:
    """Rounds until the time is over. The first one warms up and is left out."""
    samples: dict[tuple[Workload, str], list[dict[str, float]]] = collections.defaultdict(list)
    order, began = random.Random(0), time.monotonic()
    for turn in range(MOST + 1):
        if turn > LEAST and time.monotonic() - began > seconds:
            break
        for workload in workloads:
            if time.monotonic() > end:
                return samples
            for name in order.sample(list(engines), len(engines)):
                answer = engines[name].ask(workload, turn, timeout=120)
                if answer is not None and turn:
                    samples[workload, name].append(answer)
        print(f"round {turn} done after {time.monotonic() - began:.0f} s", flush=True)
    return samples


def _summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    said: dict[str, Any] = {"rounds": len(samples)}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        middle = statistics.median(values)
        said |= {name: middle, f"{name}, spread": (max(values) - min(values)) / middle if middle else 0.0}
        said[f"{name}, best"] = max(values) if name == "tokens/s" else min(values)  # of a host that others use as well
    return said


def _show(results: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["backend"] for row in results))
    table = [["model", "workload", "", *names]]
    cells: dict[tuple[str, str, str], dict[str, float]] = collections.defaultdict(dict)
    for row in results:
        for name, value in row.items():
            if isinstance(value, float) and not name.endswith(("spread", "best")):
                cells[row["model"], row["workload"], name][row["backend"]] = value
    for (model, workload, name), values in cells.items():
        own = [f"{values[backend]:.4g}" if backend in values else "" for backend in names]
        table.append([model, workload, name, *own])
    print("\n".join(columns(table, right=range(3, 3 + len(names)))), flush=True)


def _end_of(log: pathlib.Path) -> str:
    return "\n    ".join(log.read_text(errors="replace").splitlines()[-15:])


# What follows runs in the process of an engine.


class HostClock:
    """Seconds in a backend's Python, by wrapping the methods that vLLM calls."""

    def __init__(self, layers: list[Any]) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.builders: set[int] = set()
        self.builds = 0
        for builder in {layer.attn_backend.get_builder_cls() for layer in layers}:
            self._wrap(builder, "build", "builders", counted=True)
        for impl in {type(layer.impl) for layer in layers}:
            self._wrap(impl, "forward", "layers")
            self._wrap(impl, "do_kv_cache_update", "cache")

    def _wrap(self, owner: type, method: str, name: str, *, counted: bool = False) -> None:
        inner = getattr(owner, method)

        def timed(own: Any, *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = inner(own, *arguments, **named)
            self.seconds[name] += time.perf_counter() - began
            if counted:
                self.builds += 1
                self.builders.add(id(own))
            return result

        setattr(owner, method, timed)

    def reset(self) -> None:
        """Forget what was measured."""
        self.seconds.clear()
        self.builders.clear()
        self.builds = 0

    def a_step(self) -> dict[str, float]:
        """Microseconds of one step, where every group's builder is called once a step."""
        steps = max(1, self.builds // max(1, len(self.builders)))
        return {f"{name}, us a step": self.seconds[name] / steps * 1e6 for name in ("builders", "layers", "cache")}


class Worker:
    """The engine, and how each kind of workload is measured on it."""

    def __init__(self, job: Any) -> None:
        from tests.integrations.vllm_engine.engine import make_engine

        settings: dict[str, Any] = {"max_num_batched_tokens": 1024, "max_model_len": 1024}
        if not job.cpu:
            settings = {
                "max_model_len": 34816,
                "max_num_seqs": 256,  # as it is served; buffers and grids are sized by it
                "max_num_batched_tokens": 34816,
                "kv_cache_memory_bytes": 3 << 30,
                "gpu_memory_utilization": 0.16,
                "limit_mm_per_prompt": {"image": 32, **({"video": 0, "audio": 0} if job.kind == "gemma4" else {})},
            }
        self._job, self._engine, self._requests = job, make_engine(job, **settings), 0
        self._steps = TINY_STEPS if job.cpu else Steps()
        layers = self._engine.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        self._clock = HostClock([layer for layer in layers if hasattr(layer, "attn_backend")])

    def measure(self, workload: Workload, seed: int) -> dict[str, float]:
        """One sample."""
        self._engine.reset_prefix_cache()
        asks = self._asks(workload, seed)
        if workload.what == "host":
            more = range(1000 * seed + 1, 1000 * seed + 1 + self._steps.mixed)
            return self._host(asks[:-1], [self._asks(workload, own)[-1] for own in more])
        return {"first token": self._first_token, "decode": self._decode, "GPU": self._gpu}[workload.what](asks)

    def _first_token(self, asks: list[dict[str, Any]]) -> dict[str, float]:
        return {"ms": 1e3 * self._generate(asks, 1)}

    def _decode(self, asks: list[dict[str, Any]]) -> dict[str, float]:
        """The median step, and the fastest few in a row: others on the host only make steps longer."""
        self._generate(asks, 1)  # the prompts are in the prefix cache now
        for one in asks:  # some to spare: in a request's last steps nothing is scheduled any more
            self._add(one, self._steps.decoding + self._steps.counted + self._steps.settling)
        ended: list[tuple[float, int]] = []  # when a step was over, and the tokens by then
        while len(ended) <= self._steps.decoding and self._engine.llm_engine.has_unfinished_requests():
            outputs = self._step()
            if len(outputs) == len(asks):  # all decode; a step may as well only hand work on
                ended.append((time.perf_counter(), sum(len(output.outputs[0].token_ids) for output in outputs)))
        calls = self._calls_of_functions()
        self._finish()
        steps = [later - sooner for (sooner, _), (later, _) in itertools.pairwise(ended)]
        assert len(steps) >= self._steps.decoding // 2, f"{len(steps)} steps in which all requests decode"
        fastest = min(later - sooner for (sooner, _), (later, _) in zip(ended, ended[IN_A_ROW:], strict=False))
        return {
            "tokens/s": (ended[-1][1] - ended[0][1]) / len(steps) / statistics.median(steps),
            "fastest steps, us a step": 1e6 * fastest / IN_A_ROW,
            "calls of functions a step": calls,
        }

    def _calls_of_functions(self) -> float:
        """Of a step of the whole engine."""
        with cProfile.Profile() as profile:
            for _ in range(self._steps.counted):
                self._step()
        return sum(own.callcount for own in profile.getstats()) / self._steps.counted

    def _gpu(self, asks: list[dict[str, Any]]) -> dict[str, float]:
        with profile_gpu() as prefill:
            self._generate(asks, 1)
        for one in asks:  # the prompts are in the prefix cache now
            self._add(one, self._steps.decoding)
        while len(self._step()) < len(asks):
            pass
        with profile_gpu() as decoding:
            for _ in range(self._steps.profiled):
                self._step()
        self._finish()
        return {
            "prefill, ms": gpu_busy(prefill) / 1e3,
            "decoding, us a step": gpu_busy(decoding) / self._steps.profiled,
        }

    def _host(self, decoding: list[dict[str, Any]], later: list[dict[str, Any]]) -> dict[str, float]:
        """Seven requests decode; then, again and again, a step prefills one more, with an image, beside them."""
        for one in decoding:
            self._add(one, self._steps.decoding)
        while any(not output.outputs[0].token_ids for output in self._step()):
            pass
        for _ in range(self._steps.settling):
            self._step()
        self._clock.reset()
        for _ in range(self._steps.host):
            self._step()
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        found = {f"decoding: {name}": value for name, value in self._clock.a_step().items()}
        mixed = []
        for one in later:
            self._clock.reset()
            self._add(one, 1)
            self._step()
            mixed.append(self._clock.a_step())
        found |= {f"mixed: {name}": statistics.median(own[name] for own in mixed) for name in mixed[0]}
        self._finish()
        return found

    def _finish(self) -> None:
        while self._engine.llm_engine.has_unfinished_requests():
            self._step()

    def _step(self) -> list[Any]:
        outputs: list[Any] = self._engine.llm_engine.step()
        return outputs

    def _add(self, one: dict[str, Any], tokens: int) -> None:
        self._requests += 1
        self._engine.llm_engine.add_request(f"own-{self._requests}", one, self._parameters(tokens))

    def _generate(self, asks: list[dict[str, Any]], tokens: int) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        outputs = self._engine.generate(asks, self._parameters(tokens), use_tqdm=False)
        took = time.perf_counter() - began
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return took

    @staticmethod
    def _parameters(tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    def _asks(self, workload: Workload, seed: int) -> list[dict[str, Any]]:
        from tests.integrations.vllm_engine.engine import ask
        from tests.integrations.vllm_engine.models import FIRST_LETTER, IMAGE_TOKEN, image

        place, made = IMAGE_TOKEN[self._job.kind], []
        an_image, pixels = (68, TINY_PIXELS) if self._job.cpu else (261, PIXELS)  # tokens with those around it
        for index, (tokens, images) in enumerate(workload.requests):
            letters = random.Random(f"{workload} {seed} {index}")
            text = [
                FIRST_LETTER + letters.randrange(90) for _ in range(max(images + 1, tokens - 1 - an_image * images))
            ]
            each = len(text) // (images + 1)
            ids = [2]
            for number in range(images):
                ids += [*text[number * each : (number + 1) * each], place]
            ids += text[images * each :]
            made.append(ask(ids, tuple(image(number, pixels) for number in range(images))))
        return made


def main() -> None:
    """The process of an engine: the address of the one who asks, what to call itself there, and JOB.json."""
    sys.path.insert(0, os.fspath(pathlib.Path(__file__).resolve().parents[1]))
    from tests.integrations.vllm_engine.engine import read_job

    # Pickled there as a class of this module, which is `__main__` here.
    sys.modules["vllm_times"] = sys.modules["__main__"]
    address, name, file = sys.argv[1:]
    worker = Worker(read_job(pathlib.Path(file)))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # of this thread: those of torch keep theirs
    with Client(address, "AF_UNIX") as connection:
        connection.send(name)
        while True:
            workload, seed = connection.recv()
            connection.send(worker.measure(workload, seed))


if __name__ == "__main__":
    main()
