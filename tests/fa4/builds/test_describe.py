"""What is read from a build's source: values that can be asserted."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
import torch

from fa4_prefixlm.fa4.builds import describe as builds
from fa4_prefixlm.fa4.builds import locate
from fa4_prefixlm.fa4.builds.head_dims import HeadDims
from tests.backends.calls import GOOD
from tests.fa4.builds.written import write_build


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
