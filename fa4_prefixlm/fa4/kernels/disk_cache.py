"""Compiled kernels, kept on disk between processes: the first call of a new process loads what an earlier one compiled.

On by default. `FA4_PREFIXLM_CACHE_DIR` names the folder (default: `fa4_prefixlm` in `XDG_CACHE_HOME` or `~/.cache`),
`FA4_PREFIXLM_CACHE=0` switches it off. A kernel is an object file and a JSON file that says what it is, under a folder
for all that decides its code: this package's kernels, the FA4 build's sources, Python, the compiler's packages and
settings, the target GPU. Whatever changes, changes the folder: nothing stale is ever looked at.

Files are written under another name and renamed, so that processes need no lock: two that compile the same kernel at
once write it twice. An object is loaded only if it has the hash that its JSON file names. A folder that can't be
written costs one warning, and kernels are compiled as if there were none.

FA4 compiles its own kernels inside `_flash_attn_fwd`, and keeps them in an attribute of that function. `own_kernels`
makes it use this cache for the calls of this library, in this thread; everybody else's calls keep FA4's.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.fa4.builds.describe import Build

SYMBOL = "func"
COMPILER_PACKAGES = re.compile(r"nvidia-cutlass-dsl.*|quack-kernels|apache-tvm-ffi|cuda-python|cuda-bindings")
# Of FA4's interface: functions that a forward compiles by.
FORWARD_FUNCTIONS = ("_flash_attn_fwd", "_compute_tile_cumsum", "_compute_blocks_to_batch", "_flash_attn_fwd_combine")

# Kernels of this process by how it got them: "compiled" or "loaded".
counts: Counter[str] = Counter()


def root() -> pathlib.Path | None:
    """The folder of all cached kernels; None if the cache is switched off."""
    if os.environ.get("FA4_PREFIXLM_CACHE", "1").lower() in ("0", "off", "false", "no"):
        return None
    given = os.environ.get("FA4_PREFIXLM_CACHE_DIR")
    if given:
        return pathlib.Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "fa4_prefixlm"
    except RuntimeError:  # there is no home
        return None


class KernelCache:
    """Kernels by key, in memory and on disk. FA4's functions ask no more of theirs than `in`, `[]` and `[] =`.

    Attributes:
        name: of the function that compiles them, and of what was changed in it (a workaround).
        folder: None keeps them in memory only.
    """

    def __init__(self, name: str, folder: pathlib.Path | None) -> None:
        self.name, self.folder = name, folder
        self._kernels: dict[Any, Callable[..., Any]] = {}

    def __contains__(self, key: object) -> bool:
        if key in self._kernels:
            return True
        found = self._load(key)
        if found is None:
            return False
        counts["loaded"] += 1
        self._kernels[key] = found
        return True

    def __getitem__(self, key: object) -> Callable[..., Any]:
        if key not in self:
            raise KeyError(key)
        return self._kernels[key]

    def __setitem__(self, key: object, kernel: Any) -> None:
        counts["compiled"] += 1
        self._kernels[key] = kernel
        self._save(key, kernel)

    def _files(self, key: object) -> tuple[pathlib.Path, pathlib.Path] | None:
        """The kernel's object and JSON file; None if it has none."""
        text = repr((self.name, key))
        if self.folder is None or " at 0x" in text:  # an address says nothing to another process
            return None
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self.folder / f"{name}.o", self.folder / f"{name}.json"

    def _load(self, key: object) -> Callable[..., Any] | None:
        files = self._files(key)
        if files is None:
            return None
        try:
            said = json.loads(files[1].read_text())
            if hashlib.sha256(files[0].read_bytes()).hexdigest() != said["sha256"]:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        try:
            from cutlass import cute

            _share_runtime_symbols()
            module = cute.runtime.load_module(str(files[0]), enable_tvm_ffi=True)
            kernel: Callable[..., Any] = getattr(module, SYMBOL)
        except Exception as error:  # of whatever kind: compiling is always right
            _warn(f"a compiled kernel on disk could not be loaded, and is compiled again: {files[0].name}: {error}")
            return None
        return kernel

    def _save(self, key: object, kernel: Any) -> None:
        files = self._files(key)
        if files is None:
            return
        try:
            files[0].parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=files[0].parent) as scratch:
                made = pathlib.Path(scratch, files[0].name)
                kernel.export_to_c(object_file_path=str(made), function_name=SYMBOL)
                digest = hashlib.sha256(made.read_bytes()).hexdigest()
                said = pathlib.Path(scratch, files[1].name)
                said.write_text(json.dumps({"sha256": digest, "name": self.name, "key": repr(key)}, indent=1))
                os.replace(made, files[0])
                os.replace(said, files[1])
        except Exception as error:  # a full or read-only disk, or a compiler that exports nothing
            _warn(f"compiled kernels are not kept for the next process: {type(error).__name__}: {error}")


def kernels(build: Build, name: str, variant: str = "", *, persist: bool = True) -> KernelCache:
    """The cache of the kernels that `name` compiles on a build.

    Args:
        build: an FA4.
        name: of a function of FA4's interface, or "native".
        variant: what was changed in the build for them, a workaround; "" for nothing.
        persist: False keeps them in memory: they hold code of the user, of which no hash tells all.
    """
    return _kernels(build.module, name, variant, persist)


@functools.cache
def _kernels(module: str, name: str, variant: str, persist: bool) -> KernelCache:
    above = root() if persist else None
    target = None if above is None else _target()
    folder = None if above is None or target is None else above / f"{target}-{fingerprint(module)[:24]}"
    return KernelCache(f"{name} {variant}".strip(), folder)


@contextlib.contextmanager
def own_kernels(build: Build, variant: str = "", *, persist: bool = True) -> Iterator[None]:
    """Within the block, in this thread, FA4's forward compiles into the caches of this library. See `kernels`."""
    _route(build)
    token = _caches.set(lambda name: _kernels(build.module, name, variant, persist))
    try:
        yield
    finally:
        _caches.reset(token)


_caches: contextvars.ContextVar[Callable[[str], KernelCache] | None] = contextvars.ContextVar("caches", default=None)


class _Routed:
    """In the place of one of FA4's caches: this library's within `own_kernels`, FA4's for everybody else."""

    def __init__(self, name: str, theirs: Any) -> None:
        self._name, self._theirs = name, theirs

    def _now(self) -> Any:
        caches = _caches.get()
        return self._theirs if caches is None else caches(self._name)

    def __contains__(self, key: object) -> bool:
        return key in self._now()

    def __getitem__(self, key: object) -> Any:
        return self._now()[key]

    def __setitem__(self, key: object, kernel: Any) -> None:
        self._now()[key] = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)


def _route(build: Build) -> None:
    if build.module in _routed:
        return
    interface = build.part("interface")
    for name in FORWARD_FUNCTIONS:
        function = getattr(interface, name, None)
        theirs = getattr(function, "compile_cache", None)
        if theirs is not None and not isinstance(theirs, _Routed):
            function.compile_cache = _Routed(name, theirs)  # type: ignore[union-attr]
    _routed.add(build.module)


_routed: set[str] = set()


@functools.cache
def fingerprint(module: str) -> str:
    """A hash of all that decides the code of a kernel, but for its target and its key."""
    digest = hashlib.sha256()
    own = pathlib.Path(__file__).parent
    theirs = locate.find_folder(module)
    for folder in (own, *([theirs] if theirs is not None else [])):
        for source in sorted(folder.rglob("*.py")):
            _add(digest, source.relative_to(folder).as_posix(), source.read_bytes())
    _add(digest, "python", f"{sys.version_info[:2]} {platform.machine()}".encode())
    for package, version in _compiler_packages():
        _add(digest, package, version.encode())
    for variable, value in sorted(os.environ.items()):
        if variable.startswith(("CUTE_DSL_", "FLASH_ATTENTION_", "FA_")) and variable not in _NOT_CODE:
            _add(digest, variable, value.encode())
    return digest.hexdigest()


# The target is in the folder's name, and where FA4 keeps its kernels changes none.
_NOT_CODE = (
    *("CUTE_DSL_ARCH", "FLASH_ATTENTION_ARCH", "FLASH_ATTENTION_NUM_SMS"),
    *("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "CUTE_DSL_CACHE_DIR"),
)


def _add(digest: Any, name: str, content: bytes) -> None:
    digest.update(f"{name} {len(content)}\n".encode())
    digest.update(content)


@functools.cache
def _compiler_packages() -> tuple[tuple[str, str], ...]:
    found = {(own.metadata["Name"] or "").lower(): own.version for own in importlib.metadata.distributions()}
    return tuple(sorted((name, version) for name, version in found.items() if COMPILER_PACKAGES.fullmatch(name)))


@functools.cache
def _target() -> str | None:
    """The GPU that kernels are compiled for, `sm_90a-132`: its architecture and its SMs; None if there is none."""
    arch, multiprocessors = os.environ.get("CUTE_DSL_ARCH"), os.environ.get("FLASH_ATTENTION_NUM_SMS")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        arch = arch or f"sm_{device.major}{device.minor}a"
        multiprocessors = multiprocessors or str(device.multi_processor_count)
    if arch is None:
        return None
    kernel_arch = os.environ.get("FLASH_ATTENTION_ARCH")  # FA4's choice of kernel, where it is not the target's
    other = f"-as-{kernel_arch}" if kernel_arch and re.sub(r"\D", "", kernel_arch) not in arch else ""
    return f"{arch}-{multiprocessors or 'any'}{other}"


@functools.cache
def _share_runtime_symbols() -> None:
    """Objects find the symbols of the DSL's runtime only if its libraries were loaded for all to see."""
    from cutlass import cute

    for path in cute.runtime.find_runtime_libraries(enable_tvm_ffi=False):
        if os.path.exists(path):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _warn(message: str) -> None:
    if message.partition(":")[0] not in _warned:
        _warned.add(message.partition(":")[0])
        warnings.warn(f"fa4_prefixlm: {message} (FA4_PREFIXLM_CACHE_DIR, FA4_PREFIXLM_CACHE=0)", stacklevel=2)


_warned: set[str] = set()
