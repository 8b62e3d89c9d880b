"""What surrounds the code: version, citation, workflows, templates, the pages of the site."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys
import types
from typing import Any

import pytest

import fa4_prefixlm
import fa4_prefixlm.masks

yaml = pytest.importorskip("yaml")

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
GITHUB = ROOT / ".github"
API = sorted((DOCS / "api").rglob("*.md"))
TEMPLATES = sorted(path for path in GITHUB.rglob("*") if path.suffix in (".md", ".yml"))
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *GITHUB.rglob("*.md")]
# Text whose paths are of this repository. A path is told by its first folder.
NAMES_FILES = [
    *TEMPLATES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "mkdocs.yml", "CITATION.cff", ".pre-commit-config.yaml", "Makefile")),
    *ROOT.glob("ARCHITECTURE.md"),
    *sorted(DOCS.rglob("*.md")),
]
PATH = re.compile(
    r"(?<![\w/.-])((?:\.github|benchmarks|docs|examples|fa4_prefixlm|masks|tests)/[\w./-]*\w|[A-Z]+\.md|\w+\.toml)"
)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def read(path: pathlib.Path) -> Any:
    return yaml.safe_load(path.read_text())


def by_name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_one_version() -> None:
    assert str(read(ROOT / "CITATION.cff")["version"]) == fa4_prefixlm.__version__
    assert importlib.metadata.version("fa4_prefixlm") == fa4_prefixlm.__version__


def test_the_version_is_read_without_importing_the_package() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['fa4_prefixlm'] = None\n"
        "from setuptools.config.pyprojecttoml import read_configuration\n"
        "print(read_configuration('pyproject.toml')['project']['version'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fa4_prefixlm.__version__


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_workflows(path: pathlib.Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True]  # YAML 1.1 reads the key `on` so
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert job["timeout-minutes"]
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=by_name)
def test_issue_forms(path: pathlib.Path) -> None:
    form = read(path)
    if path.name == "config.yml":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_the_bug_form_asks_for_the_report_of_doctor() -> None:
    fields = {field["id"]: field for field in read(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"]}
    assert fields["doctor"]["attributes"]["label"] == "fa4-prefixlm doctor --json"
    assert fields["doctor"]["validations"]["required"] is True


@pytest.mark.parametrize("path", NAMES_FILES, ids=by_name)
def test_files_named_exist(path: pathlib.Path) -> None:
    text = "\n".join(line for line in path.read_text().splitlines() if "http" not in line)
    named = [name for name in PATH.findall(text) if not pathlib.Path(name).name.startswith("my_")]  # the reader's own
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", [*TEMPLATES, ROOT / "CONTRIBUTING.md", ROOT / "README.md", *API], ids=by_name)
def test_targets_of_make_that_are_named_exist(path: pathlib.Path) -> None:
    named = re.findall(r"(?:`|^ *(?:- run: |run: )?)make ([a-z-]+)", path.read_text(), flags=re.MULTILINE)
    assert set(named) <= TARGETS


def test_git_hooks_have_no_versions_of_their_own() -> None:
    assert {repo["repo"] for repo in read(ROOT / ".pre-commit-config.yaml")["repos"]} == {"local"}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_to_files(page: pathlib.Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^()\s]+)\)", page.read_text())]
    missing = [link for link in links if link and ":" not in link and not (page.parent / link).exists()]
    assert missing == []


def in_nav(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for own in (entry.values() if isinstance(entry, dict) else entry) for page in in_nav(own)]


def site_pages() -> types.ModuleType:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_pages", DOCS / "hooks" / "site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation() -> None:
    pages = in_nav(read(ROOT / "mkdocs.yml")["nav"])
    roots = site_pages().ROOT_PAGES
    wanted = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    wanted |= {page for name, page in roots.items() if (ROOT / name).exists()}
    assert len(pages) == len(set(pages))
    assert set(pages) == wanted


@pytest.mark.parametrize(
    ("source", "page", "link", "wanted"),
    [
        ("README.md", "index.md", "docs/mask.md#positions", "mask.md#positions"),
        ("README.md", "index.md", "docs/pictures/demo.png", "pictures/demo.png"),
        ("README.md", "index.md", "CHANGELOG.md", "changelog.md"),
        ("README.md", "index.md", "LICENSE", "https://web.example/blob/main/LICENSE"),
        ("docs/vllm.md", "vllm.md", "../README.md", "index.md"),
        ("docs/vllm.md", "vllm.md", "../masks", "https://web.example/blob/main/masks"),
        ("docs/api/call.md", "api/call.md", "../../README.md", "../index.md"),
        ("docs/api/call.md", "api/call.md", "../serving.md", "../serving.md"),
        ("docs/vllm.md", "vllm.md", "nothing.md", "nothing.md"),
        ("docs/vllm.md", "vllm.md", "#limits", "#limits"),
        ("docs/vllm.md", "vllm.md", "https://elsewhere.example/a.md", "https://elsewhere.example/a.md"),
    ],
)
def test_links_on_the_site(source: str, page: str, link: str, wanted: str) -> None:
    file = types.SimpleNamespace(abs_src_path=str(ROOT / source), src_uri=page)
    config = types.SimpleNamespace(repo_url="https://web.example/")
    text = "See [it]({}).\n\n```python\nx = y[0]({})\n```\n"
    done = site_pages().on_page_markdown(text.format(link, link), types.SimpleNamespace(file=file), config, None)
    assert done == text.format(wanted, link)  # code stays as it is


def documented() -> list[str]:
    return [name for page in API for name in re.findall(r"^::: (\S+)", page.read_text(), flags=re.MULTILINE)]


@pytest.mark.parametrize("name", documented())
def test_what_the_site_documents_is_public_and_there(name: str) -> None:
    found: Any = fa4_prefixlm
    for part in name.split(".")[1:]:
        if isinstance(found, types.ModuleType) and not hasattr(found, part):
            found = importlib.import_module(f"{found.__name__}.{part}")
        else:
            found = getattr(found, part)
    assert found.__doc__


@pytest.mark.parametrize("package", [fa4_prefixlm, fa4_prefixlm.masks], ids=lambda package: package.__name__)
def test_what_is_exported_is_on_the_site(package: types.ModuleType) -> None:
    told = {name.rpartition(".")[2] for name in documented()}
    told |= {name for page in API for name in re.findall(r"`(\w+)`", page.read_text())}
    assert set(package.__all__) - told == set()
