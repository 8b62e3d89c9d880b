"""What is read from a build's source, and the choice of backend that follows: values that can be asserted."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.backends import mask_mod_call as fa4_common
from fa4_prefixlm.backends import select as backends
from fa4_prefixlm.batch import lengths
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds import describe as builds
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.fa4.builds.head_dims import HeadDims
from fa4_prefixlm.fa4.kernels.tiles import forward_tile
from fa4_prefixlm.geometry.traits import CausalWindow, Traits
from fa4_prefixlm.masks.protocols import Reach

GPU_CALL = CallSpec(
    batched=False,
    shape_q=(1000,),
    shape_k=(1000,),
    heads_q=4,
    heads_kv=2,
    head_dim=128,
    head_dim_v=128,
    dtype=torch.bfloat16,
    device=torch.device("cuda", 0),
    needs_grad=False,
    arch=90,
)
DEMAND = Traits(intervals=1, tagged=False, banded=True, reach=Reach(1023, 256), causal_part=CausalWindow(1024))
GOOD = dataclasses.replace(builds.BEST, name="flash-attn-4 9.9")
NO_NATIVE = dataclasses.replace(GOOD, native_refusal="its internals are not known")

INTERFACE = """
import torch
from functools import lru_cache


def _flash_attn_fwd({arguments}):
    pass


def _flash_attn_bwd(q, mask_mod):
    raise NotImplementedError("Varlen backward with block sparsity is not yet supported")


@lru_cache
def _validate_head_dims(head_dim: int, head_dim_v: int, compute_capability: int, alignment: int) -> None:
    assert head_dim <= {sm90} if compute_capability == 9 else head_dim <= 128 or (head_dim, head_dim_v) == (192, 128)


def _resolve_causal_local_window(causal, window_size_left, window_size_right, mask_mod=None):
    if mask_mod is not None and not {kept}:
        return False, False, window_size_left, window_size_right
    return causal, False, window_size_left, window_size_right
"""
SPARSITY = """
class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
"""


EVERYTHING = ", ".join(sorted(GOOD.arguments))


def write_build(
    folder: pathlib.Path,
    *,
    arguments: str = EVERYTHING,
    extra: str = "",
    sm90: str = "",
    kept: bool = False,
    widest: int = 256,
) -> builds.Build:
    (folder / "interface.py").write_text(INTERFACE.format(arguments=arguments, kept=kept, sm90=widest) + extra)
    (folder / "block_sparsity.py").write_text(SPARSITY)
    (folder / "flash_fwd_sm90.py").write_text(sm90)
    return builds.describe(folder, GOOD.module, GOOD.name)


def test_a_build_is_read_from_its_source(tmp_path: pathlib.Path) -> None:
    sm90 = "SeqlenInfoCls = partial(SeqlenInfoQK.create, seqlen_q_static=1, tile_m=self.tile_m, tile_n=self.tile_n)"
    lacking = "flash-attn-4 9.9 lacks parts of the SM90 kernel that the native backend builds on"
    assert write_build(tmp_path, sm90=sm90) == dataclasses.replace(
        GOOD,
        native_refusal=lacking,
        backward_refusal="flash-attn-4 9.9 lacks parts of the SM90 backward kernel that the native one builds on",
        backward_arguments=frozenset({"q", "mask_mod"}),
        sm90_backward_head_dims="unknown",
        head_dims=HeadDims(sm100_pairs=frozenset({(192, 128)})),
    )


@pytest.mark.parametrize(
    ("sm90", "stride"),
    [
        ("x = partial(SeqlenInfoQK.create, seqlen_q_static=1)", "128"),
        ("x = SeqlenInfoQK.create(b, tile_n=self.tile_n)", "tile"),
        ("x = SeqlenInfoQK.create(b, tile_n=self.tile_n); y = SeqlenInfoQK.create(b)", "unknown"),
        ("x = partial(SomethingElse.create)", "unknown"),
    ],
)
def test_the_list_stride(tmp_path: pathlib.Path, sm90: str, stride: str) -> None:
    assert write_build(tmp_path, sm90=sm90).sm90_list_stride == stride


def test_an_old_build_refuses_a_varlen_mask(tmp_path: pathlib.Path) -> None:
    refusal = 'raise NotImplementedError("mask_mod with aux_tensors is not yet supported for varlen sequences")'
    assert not write_build(tmp_path, extra=refusal).varlen_mask
    old = write_build(tmp_path, arguments="q, k")
    assert old.lacks(frozenset({"q", "k"})) is None
    assert old.lacks(frozenset({"q", "v", "out"})) == "the forward of flash-attn-4 9.9 has no argument out, v"


def test_what_causal_does_beside_a_mask_mod_is_found_by_running_the_builds_own_rule(tmp_path: pathlib.Path) -> None:
    assert write_build(tmp_path).causal_with_mask == "ignored"
    kept = write_build(tmp_path, kept=True)
    assert kept.causal_with_mask == "kept"
    assert [defect.name for defect in kept.defects] == ["causal-over-mask-mod", "paged-block-lists"]
    assert write_build(tmp_path, extra="\ndef _resolve_causal_local_window(): pass").causal_with_mask == "ignored"
    (tmp_path / "interface.py").write_text("def _flash_attn_fwd(q): pass")
    unknown = builds.describe(tmp_path, GOOD.module, GOOD.name)
    assert (unknown.causal_with_mask, unknown.head_dims, unknown.backward_arguments) == (
        "unknown",
        HeadDims(),
        frozenset(),
    )


def test_head_dims_are_found_by_running_the_builds_own_rule(tmp_path: pathlib.Path) -> None:
    wide = write_build(tmp_path, widest=512)
    assert wide.head_dims.refusal(90, 512, 512) is None
    assert wide.masked_head_dims_refusal(90, 512, 512) == "SM90 takes head dims up to 256"
    assert wide.head_dims.refusal(90, 320, 320) == "SM90 takes head dims up to 256, (512, 512)"
    narrow = write_build(tmp_path, widest=128)
    assert narrow.masked_head_dims_refusal(90, 256, 256) == "SM90 takes head dims up to 128"
    (tmp_path / "sm100_hd256_2cta_fmha_forward.py").touch()
    assert not write_build(tmp_path).head_dims.sm100_masked_256


def test_old_limits_are_found_by_what_the_build_says(tmp_path: pathlib.Path) -> None:
    says = """
    assert learnable_sink.dtype == torch.bfloat16, "learnable_sink must be bfloat16"
    assert page_table is None, "paged KV not supported on SM 9.0"
"""
    old = write_build(tmp_path, extra=f"\ndef rest(learnable_sink, page_table):{says}")
    assert old.sink_dtypes == (torch.bfloat16,)
    assert not old.sm90_pages
    assert "sink-bfloat16-only" in [defect.name for defect in old.defects]


def test_the_installed_build_is_one_we_know() -> None:
    pytest.importorskip("flash_attn")
    build = locate.installed()
    assert build is not None
    assert build.lacks(builds.MASKED_ARGUMENTS | builds.PAGED_ARGUMENTS) is None
    assert build.causal_with_mask == "ignored"
    assert build.head_dims.refusal(90, 256, 256) is None
    assert build.varlen_mask
    assert build.varlen_lists
    if build.name == "flash-attn-4 4.0.0b36":
        assert build.sm90_list_stride == "128"
        assert build.native_refusal is None


def choose(
    build: builds.Build | None,
    call: CallSpec = GPU_CALL,
    name: str = "auto",
    tokens: int = 1000,
    arch: int = 90,
    traits: Traits | None = None,
) -> backends.Choice:
    sizes = lengths.batched(1, tokens, tokens, torch.device("cpu"))
    return backends.choose(name, dataclasses.replace(call, arch=arch), traits or DEMAND, sizes, build)


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(GOOD)
    assert (choice.name, [name for name, _ in choice.passed_over]) == ("native", ["causal"])
    summary = "FlashAttention-4's SM90 main loop over each row's interval"
    assert str(choice) == f"native: {summary} (causal passed over)"
    without = choose(NO_NATIVE)
    assert (without.name, without.passed_over[-1]) == ("varlen", ("native", "its internals are not known"))
    text = choose(NO_NATIVE, traits=dataclasses.replace(DEMAND, causal_only=CausalWindow(None)))
    assert (text.name, text.passed_over, text.reason) == ("causal", (), "the first choice")


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        ({"varlen_mask": False}, "packed", "refuses mask_mod with aux_tensors for varlen"),
        ({"varlen_lists": False}, "packed", "has no varlen block sparsity"),
        ({"sm90_list_stride": "unknown"}, "packed", "is not clear from its source"),
        ({"sm90_list_stride": "128"}, "varlen", None),
        ({"arguments": builds.CAUSAL_ARGUMENTS}, "two_pass", "has no argument aux_tensors, block_sparse_tensors"),
        ({"arguments": frozenset({"q"})}, "reference", "has no argument aux_tensors"),
    ],
)
def test_what_a_build_cannot_do_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, change: dict, name: str, why: str
) -> None:
    choice = choose(dataclasses.replace(NO_NATIVE, **change))
    assert choice.name == name
    assert why is None or why in dict(choice.passed_over)["varlen"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "FA4 takes bfloat16 and float16, not torch.float32"),
        ({"head_dim": 320}, "SM90 takes head dims up to 256"),
        ({"head_dim": 100}, "multiples of 8"),
        ({"device": torch.device("cpu")}, "the tensors are on cpu"),
    ],
)
def test_what_fa4_cannot_run_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch, change: dict, why: str) -> None:
    call = dataclasses.replace(GPU_CALL, **change)
    choice = choose(GOOD, call)
    assert choice.name == "reference"
    assert [name for name, _ in choice.passed_over] == ["causal", "native", "varlen", "packed", "two_pass"]
    assert all(why in reason for name, reason in choice.passed_over if name != "causal")
    with pytest.raises(fp.UnsupportedError, match=why):
        choose(GOOD, call, name="packed")


def test_no_fa4_and_no_fitting_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("varlen", "flash-attn-4 is not installed") in choose(None).passed_over
    assert "no kernel for sm_80" in choose(GOOD, arch=80).passed_over[-1][1]


def test_long_windowed_sequences_take_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(NO_NATIVE, tokens=2**19)
    assert choice.name == "packed"
    assert choice.passed_over[2:] == (("varlen", "its block lists would take 128 MiB, packed ones 0 MiB"),)
    assert choose(GOOD, name="varlen", tokens=2**19).reason == "asked for by name"


def test_no_query_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(GOOD, tokens=0).reason == "there are no queries"


def test_the_defect_is_harmless_only_with_tile_128_or_the_cure() -> None:
    """The tiles that need the cure are the ones of head dims above 128."""
    narrow = [
        dim for dim in (64, 96, 128, 192, 256) if forward_tile(90, dim, dim, windowed=False, max_seqlen_q=999).n != 128
    ]
    assert narrow == [192, 256]


@pytest.mark.parametrize(
    ("arch", "dims", "fine"),
    [
        (90, (256, 256), True),
        (90, (264, 64), False),
        (100, (192, 128), True),
        (100, (192, 192), False),
        (100, (256, 256), True),
    ],
)
def test_head_dims(arch: int, dims: tuple[int, int], fine: bool) -> None:
    assert (HeadDims().refusal(arch, *dims) is None) == fine


def test_sm100_blocks_cover_both_stages() -> None:
    assert str(forward_tile(100, 128, 128, windowed=False, max_seqlen_q=1000)) == "256x128"
    assert str(forward_tile(100, 128, 128, windowed=False, max_seqlen_q=128)) == "128x128"
    assert str(forward_tile(100, 256, 256, windowed=False, max_seqlen_q=1000)) == "128x128"


def test_pack_gqa_is_said_not_left_to_fa4() -> None:
    assert fa4_common.PACK_GQA is False


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        ({"banded": False}, "native", None),
        ({"intervals": 4}, "varlen", None),
        ({"intervals": 5}, "reference", "a row may see 5 intervals of keys, the kernels take 4"),
        ({"tagged": True}, "varlen", None),
        ({"custom": True, "intervals": 9}, "varlen", None),
    ],
)
def test_what_a_mask_asks_for(monkeypatch: pytest.MonkeyPatch, change: dict, name: str, why: str | None) -> None:
    traits = dataclasses.replace(DEMAND, **{"banded": False, "causal_part": None, **change})
    choice = choose(GOOD, traits=traits)
    assert choice.name == name
    assert why is None or dict(choice.passed_over)["packed"] == why
    if "tagged" in change or "custom" in change:
        with pytest.raises(fp.UnsupportedError, match="sequence"):
            choose(GOOD, name="packed", traits=traits)
