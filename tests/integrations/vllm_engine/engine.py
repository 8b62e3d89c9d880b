"""One engine in a process of its own: `python -m tests.integrations.vllm_engine.engine JOB.json`.

A `Job` says which model, backend and mode. The process answers the same prompts in several rounds, with the logprobs of
the whole vocabulary, and saves them with what ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

ROOT = pathlib.Path(__file__).parents[3]
OWN = "fa4_prefixlm.integrations.vllm.backend.PrefixLMBackend"
TRITON = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
PROGRAM = ("-m", "tests.integrations.vllm_engine.engine")
GENERATED = 8
# vLLM's compilation for each mode; graphs are captured at these sizes.
MODES: dict[str, dict[str, Any]] = {
    "eager": {"mode": 0, "cudagraph_mode": "NONE"},
    "decode": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]},
    "full": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2, 4, 8, 64, 256, 512, 1024]},
    "compile": {"cudagraph_capture_sizes": [1, 2, 4, 8, 64, 256]},
}
# What each round changes. The last three break the attention, to see that the comparison would notice.
ROUNDS = ("together", "from the prefix cache", "one by one", "attention zeroed", "spans dropped", "soft cap dropped")


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process runs.

    Attributes:
        folder: of the checkpoint, named as its kind.
        result: the file that it writes.
        backend: as for `--attention-backend`.
        mode: of `MODES`.
        rounds: of `ROUNDS`, in this order.
        cpu: "V1" or "V2": on vLLM's CPU platform, with this model runner; "": on a GPU, with vLLM's own choice.
        image_size: pixels of an image's side.
        small_size: of the images of the prompt that has many.
        budget: `max_num_batched_tokens`; small ones chunk prefills.
        tensor_parallel: GPUs.
    """

    folder: str
    result: str
    backend: str = "FA4_PREFIXLM_ALL"
    mode: str = "eager"
    rounds: tuple[str, ...] = ROUNDS[:3]
    cpu: str = ""
    image_size: int = 112
    small_size: int = 112
    budget: int = 1024
    tensor_parallel: int = 1

    @property
    def kind(self) -> str:
        """Of the model."""
        return pathlib.Path(self.folder).name.partition("-")[0]

    @property
    def log(self) -> pathlib.Path:
        """Beside the result."""
        return pathlib.Path(self.result).with_suffix(".log")

    def start(self, log: pathlib.Path, program: Sequence[str] = PROGRAM) -> subprocess.Popen[bytes]:
        """Start the process, with its output in a file.

        Args:
            log: the file.
            program: what Python runs, before the name of the job's file.
        """
        from tests.integrations.vllm_engine import cpu

        file = log.with_suffix(".json")
        file.write_text(json.dumps(dataclasses.asdict(self)))
        command = [sys.executable, *program, str(file)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        # One process, so that it can be looked into; a second GPU needs one of its own.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        environment |= cpu.environment(self.cpu) if self.cpu else {}
        with log.open("w") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def read_job(file: pathlib.Path) -> Job:
    """The job that `Job.start` wrote."""
    values = json.loads(file.read_text())
    return Job(**{**values, "rounds": tuple(values["rounds"])})


def prompts(job: Job) -> dict[str, tuple[list[int], tuple[Any, ...]]]:
    """(tokens, images) by name; a token of `IMAGE_TOKEN` is a place for an image.

    vLLM puts PaliGemma's image and BOS before a prompt, and a newline after it.
    """
    from tests.integrations.vllm_engine.models import FIRST_LETTER, IMAGE_TOKEN, image

    def text(seed: int, count: int) -> list[int]:
        return [FIRST_LETTER + (seed * 31 + index * 7) % 90 for index in range(count)]

    first, second, third, fourth = (image(index, job.image_size) for index in range(4))
    if job.kind == "paligemma2":
        return {
            "text": ([2, *text(0, 40)], ()),
            "an image": (text(1, 1), (first,)),
            "an image and text": (text(2, 20), (second,)),
            "long text": ([2, *text(6, 150)], ()),
            "a window that begins in the image": (text(3, 60), (third,)),
            "a window that begins behind the image": (text(7, 333), (fourth,)),
        }
    place = [IMAGE_TOKEN[job.kind]]
    small = tuple(image(9 + index, job.small_size) for index in range(6))
    return {
        "text": ([2, *text(0, 40)], ()),
        "one image": ([2, *text(1, 20), *place, *text(2, 15)], (first,)),
        "two images": ([2, *text(3, 5), *place, *text(4, 60), *place, *text(5, 10)], (second, third)),
        "long text": ([2, *text(6, 150)], ()),
        "many small images": ([2, *text(8, 4), *place * 6, *text(9, 4)], small),
        "an image after the window": ([2, *text(7, 333), *place, *text(8, 3)], (fourth,)),
    }


def run_all(jobs: Sequence[Job], *, at_once: int, timeout: float, total: float) -> set[Job]:
    """Run engines in processes, and print how each ended.

    Args:
        jobs: in the order in which they are started.
        at_once: processes.
        timeout: seconds of one.
        total: seconds of all; what has not ended by then is stopped.

    Returns:
        The jobs that wrote their result.
    """
    waiting, running, done = list(jobs), dict[Job, tuple[subprocess.Popen[bytes], float]](), set[Job]()
    began = time.monotonic()
    while waiting or running:
        in_time = time.monotonic() - began < total
        if not in_time:
            waiting.clear()
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            running[job] = job.start(job.log), time.monotonic()
        time.sleep(0.2)
        for job, (process, started) in list(running.items()):
            if not in_time or time.monotonic() - started > timeout:
                process.kill()
                process.wait()
            if process.poll() is None:
                continue
            del running[job]
            took = time.monotonic() - started
            print(f"{job.log.stem}: exit {process.returncode} after {took:.0f} s", flush=True)
            if process.returncode == 0:
                done.add(job)
            else:
                print("    " + "\n    ".join(job.log.read_text(errors="replace").splitlines()[-15:]), flush=True)
    print(f"{len(done)} of {len(jobs)} engines in {time.monotonic() - began:.0f} s", flush=True)
    return done


def make_engine(job: Job, **settings: Any) -> Any:
    """An `LLM` of vLLM. settings: its arguments, in place of those of the tests."""
    if job.cpu:
        from tests.integrations.vllm_engine import cpu

        os.environ[cpu.BACKEND] = TRITON if job.backend == "TRITON_ATTN" else OWN
        cpu.prepare()
        if job.cpu == "V2":
            torch.cuda.get_device_capability = lambda device=None: (9, 0)  # vLLM's Triton cache writer asks for it
    from vllm import LLM

    compilation = dict(MODES[job.mode])
    attention = {"flash_attn_version": 4} if job.backend == "FLASH_ATTN" else {}
    device: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.04}
    device["kernel_config"] = {"enable_jit_warmup": False}  # of kernels that no test uses
    if job.cpu:
        compilation["custom_ops"] = ["none"]
        device = {"dtype": "float32", "block_size": 32}
    images: dict[str, int] = {
        "gemma3": {"image": 8},
        "gemma4": {"image": 8, "video": 0, "audio": 0},
        "paligemma2": {"image": 1},
    }[job.kind]
    arguments: dict[str, Any] = {
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "max_num_batched_tokens": job.budget,
        "limit_mm_per_prompt": images,
        "max_logprobs": -1,
        "mm_encoder_attn_backend": "TORCH_SDPA",
        "disable_chunked_mm_input": True,  # forced on CUDA, but not on the CPU
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": 0,
        "tensor_parallel_size": job.tensor_parallel,
        "disable_custom_all_reduce": True,  # NCCL's, which needs no extension
        **device,
        **settings,
    }
    return LLM(
        job.folder,
        enforce_eager=job.mode == "eager",
        compilation_config=compilation,
        attention_backend=job.backend,
        attention_config=attention,
        **arguments,
    )


def ask(tokens: list[int], images: tuple[Any, ...]) -> dict[str, Any]:
    """A request of vLLM."""
    return {"prompt_token_ids": tokens, **({"multi_modal_data": {"image": list(images)}} if images else {})}


@contextlib.contextmanager
def broken(what: str) -> Iterator[None]:
    """Break the backend for a round of that name; the others run as they are."""
    from fa4_prefixlm.integrations.vllm.plans import GroupPlans

    attention, take = GroupPlans.attention, GroupPlans.take

    def zeroed(self: Any, layer: str, q: Any, kv_cache: Any, out: torch.Tensor, **options: Any) -> torch.Tensor:
        return out.fill_(0)

    def dropped(self: Any, placed: Any, **batch: Any) -> None:
        take(self, dataclasses.replace(placed, spans=None), **batch)

    def uncapped(self: Any, layer: str, q: Any, kv_cache: Any, out: torch.Tensor, **options: Any) -> torch.Tensor:
        return attention(self, layer, q, kv_cache, out, **{**options, "softcap": 0.0})

    if what == "attention zeroed":
        GroupPlans.attention = zeroed  # type: ignore[method-assign]
    if what == "soft cap dropped":
        GroupPlans.attention = uncapped  # type: ignore[method-assign]
    if what == "spans dropped":
        GroupPlans.take = dropped  # type: ignore[method-assign]
    try:
        yield
    finally:
        GroupPlans.attention, GroupPlans.take = attention, take  # type: ignore[method-assign]


def run(job: Job) -> dict[str, Any]:
    """All rounds: by round and prompt, what `oracle.said` makes of an answer, with the tokens found in the cache."""
    from vllm import SamplingParams

    from tests.integrations.vllm_engine import oracle

    began = time.monotonic()
    engine = make_engine(job)
    up = time.monotonic()
    own = {name: ask(*prompt) for name, prompt in prompts(job).items()}
    common: dict[str, Any] = {"temperature": 0, "max_tokens": GENERATED, "logprobs": -1, "ignore_eos": True}
    everything, answers = SamplingParams(**common, prompt_logprobs=-1), SamplingParams(**common)
    rounds: dict[str, dict[str, tuple[list[int], torch.Tensor, int, int]]] = {}
    for name in job.rounds:
        engine.reset_prefix_cache()
        with broken(name):
            if name == "from the prefix cache":
                engine.generate(list(own.values()), answers, use_tqdm=False)
            wanted = answers if name == "from the prefix cache" else everything
            batches = [[one] for one in own] if name == "one by one" else [list(own)]
            outputs = [
                output
                for batch in batches
                for output in engine.generate([own[one] for one in batch], wanted, use_tqdm=False)
            ]
        rounds[name] = {
            prompt: (*oracle.said(output), output.num_cached_tokens or 0)
            for prompt, output in zip(own, outputs, strict=True)
        }
    config = engine.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    seconds = {"engine": up - began, "answers": time.monotonic() - up}
    return {
        "rounds": rounds,
        "counts": _counts(),
        "kernels": _kernels(),
        "graphs": str(config.compilation_config.cudagraph_mode),
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "backends": sorted({layer.attn_backend.__name__ for layer in layers if hasattr(layer, "attn_backend")}),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def _counts() -> dict[str, int]:
    from fa4_prefixlm.integrations.vllm.backend import counts

    return dict(counts)


def _kernels() -> dict[str, int]:
    """Kernels of the process by how it got them: "compiled", or "loaded" from the cache on disk."""
    from fa4_prefixlm.fa4.kernels.disk_cache import counts

    return dict(counts)


def main() -> None:
    job = read_job(pathlib.Path(sys.argv[1]))
    torch.save(run(job), job.result)


if __name__ == "__mp_main__":  # a worker of a tensor parallel engine, which begins with this module
    from tests.integrations.vllm_engine import cpu

    if cpu.BACKEND in os.environ:
        cpu.prepare()

if __name__ == "__main__":
    main()
