"""What `fa4-prefixlm check` and `doctor` said of builds, in one small file, and as the tables of docs/builds.md:

fa4-prefixlm check --json check.json; fa4-prefixlm doctor --arch sm_90 --json > doctor.json
python benchmarks/builds.py check.json doctor.json --commit COMMIT --save FILE    # adds to FILE, or replaces
python benchmarks/builds.py --show FILE
"""

from __future__ import annotations

import argparse
import json
import pathlib

from harness import write

from fa4_prefixlm.testing.tables import markdown

BACKENDS = ("causal", "native", "varlen", "packed", "two_pass", "reference")


def condensed(check: dict, doctor: dict, commit: str) -> list[dict]:
    """An entry for each build that is in both. Ratios to causal are of the whole output, per case."""
    facts = {build["name"]: build["facts"] for build in doctor["builds"]}
    entries = []
    for build in check["builds"]:
        name, results = build["name"], build["results"]
        band = {own["case"]: own["error"] for own in results if own["backend"] == "causal"}
        entries.append(
            {
                "name": name,
                "module": build["module"],
                "device": check["machine"]["gpu"],
                "versions": check["versions"],
                "commit": commit,
                "level": check["level"],
                "facts": facts[name],
                "takes": {
                    kind: own[name]["backend"] + " (keys gathered)" * own[name]["gathered"]
                    for kind, own in doctor["takes"]["sm_90"].items()
                },
                "probes": {own["name"]: {"verdict": own["verdict"], "error": own["error"]} for own in build["probes"]},
                "backends": {
                    backend: _backend([own for own in results if own["backend"] == backend], band)
                    for backend in BACKENDS
                    if any(own["backend"] == backend for own in results)
                },
            }
        )
    return entries


def _backend(results: list[dict], band: dict[str, float]) -> dict[str, object]:
    ran = [own for own in results if own["error"] is not None]
    compared = [own for own in ran if own["agreement"] is not None]
    verdicts = [own["verdict"] for own in results]
    found: dict[str, object] = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    if ran:
        found["largest_error"] = max(own["error"] for own in ran)
        found["largest_ratio_to_causal"] = round(max(own["error"] / band[own["case"]] for own in ran), 3)
        found["largest_lse_error"] = max(own["lse_error"] for own in ran)
        found["of_causal"] = {own["case"]: round(own["speed"]["of_causal"], 2) for own in ran if own["speed"]}
    if compared:
        same = sum(own["agreement"]["same_bits"] for own in compared)
        found["same_bits_as_the_first_build"] = f"{same} of {len(compared)}"
    return found


def tables(content: dict) -> str:
    """Markdown: what was seen, then what each build is and what it takes."""
    builds = content["builds"]
    header = ["", *(own["name"] for own in builds)]
    seen = [
        [f"`{name}`", *(_seen(own["backends"].get(name)) for own in builds)]
        for name in BACKENDS
        if any(name in own["backends"] for own in builds)
    ]
    seen += [[f"bare build: {name}", *(_probe(own["probes"][name]) for own in builds)] for name in builds[0]["probes"]]
    facts, takes = (
        [[label, *(own[part][label] for own in builds)] for label in builds[0][part]] for part in ("facts", "takes")
    )
    stacks = "\n".join(
        f"- {own['name']}: {own['device']}; "
        + ", ".join(f"{name} {version}" for name, version in own["versions"].items() if name not in _OWN)
        + f"; {own['level']} cases, commit {own['commit']}."
        for own in builds
    )
    parts = [markdown(header, seen), [stacks], markdown(header, facts), markdown(header, takes)]
    return "\n\n".join("\n".join(part) for part in parts)


_OWN = ("fa4_prefixlm", "flash-attn-4", "vllm")


def _seen(own: dict | None) -> str:
    if own is None:
        return ""
    bad = {name: count for name, count in own.items() if name in ("WRONG", "failed")}
    if bad:
        return ", ".join(f"**{count} {name}**" for name, count in bad.items())
    if "largest_error" not in own:
        return "refused"
    said = (
        f"{own['ok']} exact, error at most {own['largest_error']:.1e}, {own['largest_ratio_to_causal']:.2f} of causal's"
    )
    return f"{said}; {own.get('refused')} refused" if own.get("refused") else said


def _probe(own: dict) -> str:
    if own["verdict"] == "defect":
        return f"wrong ({own['error']:.2g})" if own["error"] is not None else "raises"
    return {"ok": "right", "skipped": "does not apply"}.get(own["verdict"], own["verdict"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=pathlib.Path, nargs="*", metavar="FILE")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--save", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--show", type=pathlib.Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.show:
        print(tables(json.loads(arguments.show.read_text())))
        return
    check, doctor = (json.loads(file.read_text()) for file in arguments.inputs)
    held = json.loads(arguments.save.read_text())["builds"] if arguments.save.exists() else []
    new = condensed(check, doctor, arguments.commit)
    names = [own["name"] for own in new]
    content = {"builds": [*(own for own in held if own["name"] not in names), *new]}
    write(arguments.save, content)


if __name__ == "__main__":
    main()
