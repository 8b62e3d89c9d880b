"""The real vLLM engine on every attention backend: whose logprobs are right, and how long users wait.

    python benchmarks/vllm_engine.py exact --save benchmarks/results/h100-vllm-exactness.json
    python benchmarks/vllm_engine.py time --save benchmarks/results/h100-vllm-time.json

Random weights; one process for each engine. `exact`: the logprobs of the whole vocabulary, at all positions of prompts
and answers, of prompts together, one by one and from the prefix cache, against transformers' eager attention in
float32, for Gemma 3 and Gemma 4 and every mode of CUDA graphs. `time`: see `vllm_times.py`. Both need vLLM 0.33 and a
Hopper GPU; `--cpu V1` or `V2` tests the program without one, on vLLM's CPU platform.
"""

from __future__ import annotations

import argparse
import itertools
import math
import pathlib
import sys
import tempfile
from typing import Any

import torch
from harness import provenance, write

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the tests have the engine and the models

from fa4_prefixlm.testing.tables import columns
from tests.integrations.vllm_engine import models, oracle
from tests.integrations.vllm_engine.engine import MODES, ROUNDS, Job, prompts, run_all

OURS = ("FA4_PREFIXLM", "FA4_PREFIXLM_ALL")
BACKENDS = (*OURS, "TRITON_ATTN", "TRITON_FLASH_ATTN", "FLASH_ATTN")
BAND = 1.2  # times the error of the best other backend
# What bfloat16 itself may be off: transformers' own error in it. With more, the weights are too sharp to judge by.
OWN_ERROR = 0.2
_WIDE = {"layers": 4, "hidden": 512, "heads": 4, "kv_heads": 2, "head_dim": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "gemma3": {**_WIDE, "window": 384, "image_size": 224, "image_tokens": 256},
    "gemma4": {**_WIDE, "window": 96, "global_head_dim": 512},
}


def exact(arguments: argparse.Namespace, folder: pathlib.Path) -> tuple[dict[str, Any], bool]:
    """(what was measured, whether all of it is right)."""
    for kind in arguments.models:
        shape = {} if arguments.cpu else SHAPES[kind]
        models.make(kind, folder / kind, dtype=torch.float32 if arguments.cpu else torch.bfloat16, **shape)
    jobs = [
        Job(
            folder=str(folder / kind),
            result=str(folder / f"{kind}-{backend}-{mode}.pt"),
            backend=backend,
            mode=mode,
            rounds=ROUNDS[:3],
            cpu=arguments.cpu,
            image_size=112 if arguments.cpu else 224,
            small_size=96 if kind == "gemma4" else (112 if arguments.cpu else 224),
            budget=160 if arguments.cpu else 1024,
            tensor_parallel=arguments.tensor_parallel,
        )
        for kind, mode, backend in itertools.product(arguments.models, arguments.modes, arguments.backends)
    ]
    done = run_all(jobs, at_once=arguments.jobs, timeout=arguments.timeout, total=arguments.total)
    rows = [judge(job, "cpu" if arguments.cpu else "cuda") for job in jobs if job in done]
    bands = [band(rows, kind, mode) for kind, mode in itertools.product(arguments.models, arguments.modes)]
    _show(rows, [own for own in bands if own])
    silent = [f"{job.kind} {job.backend} {job.mode}: no answer" for job in jobs if job not in done]
    wrong = [line for line in silent if line.split()[1] in OURS]
    wrong += [line for own in bands if own for line in own["wrong"]]
    for line in [*silent, *(f"WRONG: {line}" for line in wrong)]:
        print(line)
    return {"band": BAND, "wrong": wrong, "silent": silent, "bands": bands, "results": rows}, not wrong


def judge(job: Job, device: str) -> dict[str, Any]:
    """The largest error of a logprob in each round, of texts and of prompts with images, and what it is to be held to.

    transformers: the same error of transformers in the engine's precision. causal: what an engine that runs images
    causally would be off.
    """
    saved = torch.load(job.result, weights_only=False)
    low = torch.float32 if job.cpu else torch.bfloat16
    row: dict[str, Any] = {"model": job.kind, "backend": job.backend, "mode": job.mode}
    row |= {name: saved[name] for name in ("graphs", "runner", "backends", "counts", "kernels", "seconds")}
    row |= {"transformers": 0.0, "causal": 0.0, "rounds": {}}
    asked = prompts(job)
    for name, answers in saved["rounds"].items():
        errors = {"text": 0.0, "image": 0.0}
        for prompt, (tokens, rows, first, _) in answers.items():
            images, ids = asked[prompt][1], tokens[:-1]
            right = _expected(job, prompt, ids, device)[first - 1 :]
            what = "image" if images else "text"
            errors[what] = max(errors[what], _furthest(rows, right))
            if name == ROUNDS[0]:
                own = _expected(job, prompt, ids, device, dtype=low)[first - 1 :]
                row["transformers"] = max(row["transformers"], _furthest(own, right))
                if images:
                    causal = _expected(job, prompt, ids, device, spans=False)[first - 1 :]
                    row["causal"] = max(row["causal"], _furthest(causal, right))
        row["rounds"][name] = errors
    return row


def band(rows: list[dict[str, Any]], kind: str, mode: str) -> dict[str, Any] | None:
    """How far this library's backends and the best other one are off, in one mode of one model."""
    errors = {
        row["backend"]: max(max(errors.values()) for errors in row["rounds"].values())
        for row in rows
        if (row["model"], row["mode"]) == (kind, mode)
    }
    peers = {name: error for name, error in errors.items() if name not in OURS}
    if not errors:
        return None
    best = min(peers.values(), default=None)
    wrong = []
    for row in rows:
        if (row["model"], row["mode"]) != (kind, mode) or row["backend"] not in OURS:
            continue
        name, error = f"{kind} {row['backend']} {mode}", errors[row["backend"]]
        if best is not None and error > BAND * best:
            wrong.append(f"{name}: {error:.3f}, the best other backend {best:.3f}")
        if best is None and error > max(BAND * row["transformers"], 1e-2):
            wrong.append(f"{name}: {error:.3f}, transformers in this precision {row['transformers']:.3f}")
        if row["transformers"] > OWN_ERROR:
            wrong.append(f"{name}: transformers itself is {row['transformers']:.3f} off in this precision")
        if row["causal"] < 5 * max(error, 1e-3):
            wrong.append(f"{name}: a causal engine would be {row['causal']:.3f} off, too little to tell")
        if row["counts"] and not row["counts"].get("steps with images"):
            wrong.append(f"{name}: no step with an image ran on this library")
    return {"model": kind, "mode": mode, "errors": errors, "best other": best, "wrong": wrong}


def _expected(job: Job, prompt: str, ids: list[int], device: str, **how: Any) -> torch.Tensor:
    key = (job.folder, prompt, tuple(ids), tuple(sorted(how.items(), key=str)))
    if key not in _known:
        _known[key] = oracle.expected(job.folder, ids, prompts(job)[prompt][1], device=device, **how)
    return _known[key]


_known: dict[Any, torch.Tensor] = {}


def _furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    """Infinity where a logprob is missing or not a number: `max` would pass over a NaN."""
    furthest = float((one - other).abs().max())
    return furthest if math.isfinite(furthest) else math.inf


def _show(rows: list[dict[str, Any]], bands: list[dict[str, Any]]) -> None:
    table = [["model", "mode", "backend", "graphs", *ROUNDS[:3], "transformers", "if causal"]]
    for row in rows:
        errors = [f"{own['text']:.4f} {own['image']:.4f}" for own in row["rounds"].values()]
        limits = [f"{row['transformers']:.4f}", f"{row['causal']:.2f}"]
        table.append([row["model"], row["mode"], row["backend"], row["graphs"].rpartition(".")[2], *errors, *limits])
    print("largest error of a logprob, text and image")
    print("\n".join(columns(table, right=range(4, 9))))
    for own in bands:
        ours = {name: error for name, error in own["errors"].items() if name in OURS}
        said = ", ".join(f"{name} {error:.4f}" for name, error in ours.items())
        print(f"{own['model']} {own['mode']}: {said}; best other backend {own['best other']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("exact", "time"))
    parser.add_argument("--save", type=pathlib.Path, metavar="FILE", help="keep the results as JSON")
    parser.add_argument("--models", nargs="+", default=["gemma3", "gemma4"], choices=tuple(SHAPES))
    again = "time: one can be named again, as FLASH_ATTN:again, to see how far two engines of the same code differ"
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), help=again)
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), help="exact: all by default; time: compile")
    parser.add_argument("--jobs", type=int, default=8, help="exact: engines at once on one GPU")
    parser.add_argument(
        "--timeout", type=float, default=400, metavar="SECONDS", help="of one engine's start or answers"
    )
    parser.add_argument("--seconds", type=float, default=100, help="time: of measuring, for each model")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="time: workloads whose name holds a TEXT"
    )
    parser.add_argument(
        "--total", type=float, default=480, metavar="SECONDS", help="of all engines; what is left is out"
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="GPUS")
    parser.add_argument("--cpu", default="", choices=("", "V1", "V2"), help="on vLLM's CPU platform, tiny models")
    parser.add_argument("--keep", type=pathlib.Path, metavar="FOLDER", help="keep checkpoints and logs there")
    arguments = parser.parse_args()
    arguments.modes = arguments.modes or (["compile"] if arguments.what == "time" else list(MODES))
    if not arguments.cpu and not torch.cuda.is_available():
        print("this benchmark needs a Hopper GPU")
        return 2
    import vllm_times

    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run = exact if arguments.what == "exact" else vllm_times.time_all
        content, right = run(arguments, folder)
    if arguments.save:
        write(arguments.save, {**provenance(), **content})
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
