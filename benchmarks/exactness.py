"""What the GPU tests measured, in one small file:

    pytest -m gpu --gpu-report report.jsonl; python benchmarks/exactness.py report.jsonl --save FILE

Per backend and kernel kind: number of calls, largest relative error, largest ratio to the causal error on the same data
(calls on batches of a few rows, where the causal error is not a band, are left out of the ratio), largest LSE error.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections import defaultdict

from harness import provenance


def summarise(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for line in lines:
        groups[str(line["backend"]), str(line["kind"])].append(line)
    rows: list[dict[str, object]] = []
    for (backend, kind), calls in sorted(groups.items()):
        banded = [call["error"] / call["band"] for call in calls if "batch" not in call and call["band"] > 0]
        rows.append(
            {
                "backend": backend,
                "kind": kind,
                "calls": len(calls),
                "largest_error": _short(max(call["error"] for call in calls)),
                "largest_ratio_to_causal": _short(max(banded, default=0.0)),
                "largest_lse_error": _short(max(call["lse_error"] for call in calls)),
            }
        )
    return rows


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--save", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    rows = summarise([json.loads(line) for line in arguments.report.read_text().splitlines()])
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in row.items()))
    arguments.save.parent.mkdir(parents=True, exist_ok=True)
    content = {**provenance(), "what": __doc__.split("\n\n")[-1].replace("\n", " ").strip(), "results": rows}
    arguments.save.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
