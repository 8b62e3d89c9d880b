"""Whether a build's internals are those that the native backend was run on.

The native backend subclasses FA4's SM90 kernel, so it depends on more than signatures. A build is recognised by a hash
of the source that the backend depends on. Any other is refused, until the GPU suite has been run on it and its hash is
added here.
"""

from __future__ import annotations

import ast
import hashlib
import pathlib

# file: the definitions in it that the native backend depends on; None is all of the file.
PARTS: dict[str, frozenset[str] | None] = {
    "flash_fwd_sm90.py": None,
    "flash_fwd.py": frozenset({"FlashAttentionForwardBase"}),
    "block_info.py": frozenset({"BlockInfo"}),
    "seqlen_info.py": frozenset({"SeqlenInfoQK"}),
    "block_sparsity.py": frozenset({"BlockSparseTensors"}),
    "mask.py": frozenset(
        {
            "MASK_R2P_CHUNK_SIZE",
            "mask_r2p_lambda",
            "r2p_bitmask_above",
            "r2p_bitmask_below",
            "sm90_col_to_r2p_idx",
        }
    ),
    "paged_kv.py": None,
    "pack_gqa.py": None,
}

# Builds on which the GPU suite ran on an H200 (benchmarks/results/).
KNOWN = {
    "fd15937122d2f57b": "flash-attn-4 4.0.0b36",
    "3583792d4a0ede17": "vllm 0.33.0",
}


# The same of the native backward: its kernel, and FA4's own kernels before and after it.
BACKWARD_PARTS: dict[str, frozenset[str] | None] = {
    "flash_bwd_sm90.py": None,
    "flash_bwd_preprocess.py": None,
    "flash_bwd_postprocess.py": None,
    "block_info.py": frozenset({"BlockInfo"}),
    "seqlen_info.py": frozenset({"SeqlenInfoQK"}),
    "block_sparsity.py": frozenset({"BlockSparseTensors"}),
    "tile_scheduler.py": frozenset({"SingleTileVarlenScheduler", "VarlenDecoder"}),
    "barrier.py": frozenset({"arrive_inc", "ld_acquire", "red_release"}),
    "named_barrier.py": frozenset({"NamedBarrierBwd"}),
    "mask.py": PARTS["mask.py"],
    "interface.py": frozenset(
        {
            "BIN_BATCH_SEARCH_THRESH",
            "_bwd_postprocess_convert",
            "_bwd_preprocess",
            "_compile_bwd_postprocess",
            "_compile_bwd_preprocess",
            "_compute_tile_cumsum",
        }
    ),
}

KNOWN_BACKWARD = {"5a37cae5e83dc379": "flash-attn-4 4.0.0b36"}


def backward_refusal(folder: pathlib.Path, name: str) -> str | None:
    """Why the native backward is not offered on the build in `folder`; None if it was run on this very code."""
    found = fingerprint(folder, BACKWARD_PARTS)
    if found is None:
        return f"{name} lacks parts of the SM90 backward kernel that the native one builds on"
    if found not in KNOWN_BACKWARD:
        known = ", ".join(KNOWN_BACKWARD.values())
        return f"the SM90 backward kernel of {name} is not one that the native one was run on ({known})"
    return None


def native_refusal(folder: pathlib.Path, name: str) -> str | None:
    """Why the native backend is not offered on the build in `folder`; None if it was run on this very code."""
    found = fingerprint(folder)
    if found is None:
        return f"{name} lacks parts of the SM90 kernel that the native backend builds on"
    if found not in KNOWN:
        return f"the SM90 kernel of {name} is not one that the native backend was run on ({', '.join(KNOWN.values())})"
    return None


def fingerprint(folder: pathlib.Path, parts: dict[str, frozenset[str] | None] = PARTS) -> str | None:
    """The hash of `parts` in a build's `cute` package; None if one is missing."""
    digest = hashlib.sha256()
    for file, names in parts.items():
        path = folder / file
        if not path.is_file():
            return None
        source = path.read_text()
        nodes = [node for node in ast.parse(source).body if names is not None and _defines(node) & names]
        if names is not None and names - {name for node in nodes for name in _defines(node)}:
            return None
        for text in [source] if names is None else [ast.get_source_segment(source, node) or "" for node in nodes]:
            digest.update(text.encode())
    return digest.hexdigest()[:16]


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()
