"""The code blocks of the README and the docs run, in order, as one program a page."""

from __future__ import annotations

import json
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_blocks_run(page: pathlib.Path) -> None:
    names: dict[str, object] = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: pathlib.Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize(("page", "name"), [("README.md", "h200-forward"), ("docs/serving.md", "h200-serving")])
def test_pages_quote_the_kept_results(page: str, name: str) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from table import table

    assert table(results) in (ROOT / page).read_text()


def test_the_page_of_builds_quotes_the_kept_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "h200-builds.json").read_text())
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from builds import tables

    assert tables(results) in (ROOT / "docs" / "builds.md").read_text()
