"""The process that runs cases on one build, asked over a pipe: one JSON object a line in, one out.

    {"do": "run", "case": NAME, "backend": NAME, "save": FILE or null}   -> an `Outcome`
    {"do": "time", "case": NAME, "backends": [NAME, ...]}                -> {"speeds": [`Speed`, ...]}
    {"do": "probe", "name": NAME}                                        -> a `ProbeOutcome`

With "ends": true in an answer, the process can go no further (its CUDA context is lost) and ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import torch

from fa4_prefixlm.tools.check.cases import CASES
from fa4_prefixlm.tools.check.probes import probe
from fa4_prefixlm.tools.check.run import run_case
from fa4_prefixlm.tools.check.speed import time_case


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
    """A kernel broke the CUDA context, so that everything after it fails too. Otherwise gives free memory back."""
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
        torch.set_num_threads(1)  # many of these run at once, and their work is on the GPU
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
