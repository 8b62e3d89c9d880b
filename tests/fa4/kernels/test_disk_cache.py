"""Compiled kernels on disk: another process loads them, and what should not be loaded is compiled again.

Kernels are cross-compiled for Hopper; each process says how many it compiled and how many it loaded.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import pytest

pytest.importorskip("flash_attn", reason="flash-attn-4 is not installed")

from fa4_prefixlm.fa4.kernels import disk_cache
from fa4_prefixlm.fa4.kernels.disk_cache import KernelCache
from fa4_prefixlm.tools.crosscompile import TARGETS

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys, warnings
from fa4_prefixlm.fa4.kernels import disk_cache, workarounds
from fa4_prefixlm.tools import crosscompile
changes = json.loads(sys.argv[2])
if "source" in changes:  # as if a source file of a kernel were another one
    disk_cache._compiler_packages = lambda: (("quack-kernels", changes["source"]),)
if "workaround" in changes:
    workarounds._enabled = changes["workaround"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for variant in json.loads(sys.argv[1]):
        crosscompile.compile_variant(crosscompile.Variant(**variant))
warned = [str(own.message) for own in caught if "compiled kernel" in str(own.message)]
from flash_attn.cute import interface
theirs = len(interface._flash_attn_fwd.compile_cache.cache)
print("COUNTS", json.dumps({**disk_cache.counts, "warned": warned, "theirs": theirs}))
"""

NATIVE = {"backend": "native", "head_dim": 64, "head_dim_v": 64}
CAUSAL = {"backend": "causal", "head_dim": 64, "head_dim_v": 64}
VARLEN = {"backend": "varlen", "head_dim": 64, "head_dim_v": 64}
PACKED = {"backend": "packed", "head_dim": 64, "head_dim_v": 64}
BOTH = [NATIVE, CAUSAL]


def start(variants: list[dict], folder: pathlib.Path, *, changes: dict | None = None, **environment: str):
    """A process that compiles the variants, or finds them in `folder`."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(variants), json.dumps(changes or {})]
    settings = {"FA4_PREFIXLM_CACHE": "1", "FA4_PREFIXLM_CACHE_DIR": str(folder), **TARGETS["sm_90"], **environment}
    return subprocess.Popen(
        command, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def counts(process) -> dict:
    out, errors = process.communicate(timeout=300)
    said = [line for line in out.splitlines() if line.startswith("COUNTS ")]
    assert said, errors
    return {"compiled": 0, "loaded": 0, **json.loads(said[0].removeprefix("COUNTS "))}


def run(variants: list[dict], folder: pathlib.Path, **options) -> dict:
    return counts(start(variants, folder, **options))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A cache that two processes filled at once, with the same kernels."""
    folder = tmp_path_factory.mktemp("cache") / "made by the first process"
    for process in [start(BOTH, folder) for _ in range(2)]:
        found = counts(process)
        assert found["compiled"] + found["loaded"] == 2
        assert not found["warned"]
    return folder


@pytest.fixture
def cache(filled: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it."""
    return pathlib.Path(shutil.copytree(filled, tmp_path / "cache"))


def objects(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.rglob("*.o"))


def test_the_next_process_compiles_nothing(cache: pathlib.Path) -> None:
    found = run(BOTH, cache)
    assert (found["compiled"], found["loaded"]) == (0, 2)
    assert found["theirs"] == 0  # FA4's own cache holds nothing of this library's
    assert len(objects(cache)) == 2
    assert not list(cache.rglob(".new-*"))


def test_every_way_of_compiling_is_kept(tmp_path: pathlib.Path) -> None:
    variants = [VARLEN, PACKED]
    assert run(variants, tmp_path)["compiled"] == 2
    found = run(variants, tmp_path)
    assert (found["compiled"], found["loaded"]) == (0, 2)


def test_a_workaround_is_part_of_the_kernel(tmp_path: pathlib.Path) -> None:
    """A kernel that was compiled without it is never one for a call that needs it."""
    assert run([VARLEN], tmp_path, changes={"workaround": False})["compiled"] == 1
    assert run([VARLEN], tmp_path)["compiled"] == 1
    for workaround in (True, False):
        found = run([VARLEN], tmp_path, changes={"workaround": workaround})
        assert (found["compiled"], found["loaded"]) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "environment"),
    [({"source": "another"}, {}), ({}, {"CUTE_DSL_LINEINFO": "1"}), ({}, {"FLASH_ATTENTION_NUM_SMS": "114"})],
    ids=str,
)
def test_what_decides_the_code_is_looked_at(cache: pathlib.Path, changes: dict, environment: dict) -> None:
    found = run([CAUSAL], cache, changes=changes, **environment)
    assert (found["compiled"], found["loaded"]) == (1, 0)
    assert run([CAUSAL], cache)["loaded"] == 1  # the others are still there


def test_switched_off(cache: pathlib.Path) -> None:
    before = objects(cache)
    found = run([CAUSAL], cache, FA4_PREFIXLM_CACHE="0")
    assert (found["compiled"], found["loaded"]) == (1, 0)
    assert objects(cache) == before


def test_a_folder_that_cannot_be_written_warns_once(tmp_path: pathlib.Path) -> None:
    in_the_way = tmp_path / "a file"
    in_the_way.touch()
    found = run(BOTH, in_the_way / "cache")
    assert (found["compiled"], found["loaded"]) == (2, 0)
    assert len(found["warned"]) == 1


def test_a_broken_object_is_compiled_again(cache: pathlib.Path) -> None:
    for path in objects(cache):
        path.write_bytes(path.read_bytes()[:1000])
    found = run(BOTH, cache)
    assert (found["compiled"], found["loaded"]) == (2, 0)
    assert run(BOTH, cache)["loaded"] == 2


def test_a_source_of_a_kernel_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    def fingerprint() -> str:
        return disk_cache.fingerprint.__wrapped__("flash_attn.cute")

    before = fingerprint()
    assert fingerprint() == before
    theirs = disk_cache.locate.find_folder("flash_attn.cute")
    copy = pathlib.Path(shutil.copytree(theirs, tmp_path / "cute", ignore=shutil.ignore_patterns("__pycache__")))
    monkeypatch.setattr(disk_cache.locate, "find_folder", lambda module: copy)
    assert fingerprint() == before
    (copy / "mask.py").write_text((copy / "mask.py").read_text() + "\n")
    changed = fingerprint()
    assert changed != before
    monkeypatch.setattr(disk_cache, "_compiler_packages", lambda: (("nvidia-cutlass-dsl", "0"),))
    assert fingerprint() not in (before, changed)


class TestFolder:
    def test_where_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in ("FA4_PREFIXLM_CACHE", "FA4_PREFIXLM_CACHE_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("HOME", "/somebody")
        assert disk_cache.root() == pathlib.Path("/somebody/.cache/fa4_prefixlm")
        monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
        assert disk_cache.root() == pathlib.Path("/caches/fa4_prefixlm")
        monkeypatch.setenv("FA4_PREFIXLM_CACHE_DIR", "~/kernels")
        assert disk_cache.root() == pathlib.Path("/somebody/kernels")
        monkeypatch.setenv("FA4_PREFIXLM_CACHE", "0")
        assert disk_cache.root() is None


class Exported:
    """A kernel that exports a file of its own."""

    def export_to_c(self, *, object_file_path: str, function_name: str) -> None:
        pathlib.Path(object_file_path).write_bytes(b"an object")


def test_a_key_with_an_address_stays_in_memory(tmp_path: pathlib.Path) -> None:
    """It says nothing to another process, or the wrong thing."""
    cache = KernelCache("f", tmp_path)
    for key, files in (((1, object()), 0), ((1, "a key"), 2)):
        cache[key] = Exported()
        assert key in cache
        assert len(list(tmp_path.iterdir())) == files


def test_a_disk_that_is_full_costs_a_warning(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def export_to_c(self, *, object_file_path: str, function_name: str) -> None:
            pathlib.Path(object_file_path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache, "_warned", set())
    cache, kernel = KernelCache("f", tmp_path), Full()
    with pytest.warns(UserWarning, match="not kept for the next process"):
        cache["a"] = kernel
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache["b"] = kernel
    assert cache["a"] is cache["b"] is kernel
    assert not list(tmp_path.iterdir())
    assert "c" not in cache
    with pytest.raises(KeyError):
        cache["c"]


def test_calls_of_others_keep_their_cache() -> None:
    """In another thread too: the caches are those of a block of code, not of the process."""
    from concurrent.futures import ThreadPoolExecutor

    from fa4_prefixlm.fa4.builds import locate

    build = locate.installed()
    theirs = build.part("interface")._flash_attn_fwd.compile_cache
    with disk_cache.own_kernels(build, persist=False):
        routed = build.part("interface")._flash_attn_fwd.compile_cache
        routed["ours"] = 1
        assert "ours" in routed
        with ThreadPoolExecutor(1) as other:
            assert not other.submit(lambda: "ours" in routed).result()
        with disk_cache.own_kernels(build, "with something", persist=False):
            assert "ours" not in routed
    assert "ours" not in routed
    assert "ours" not in theirs
    routed["theirs"] = 2
    with disk_cache.own_kernels(build, persist=False):
        assert "theirs" not in routed
    del routed.cache["theirs"]
