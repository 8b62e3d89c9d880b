"""A build is known by a hash of its code."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from fa4_prefixlm.fa4.builds import fingerprint


@pytest.mark.slow
def test_a_build_is_known_by_its_code(tmp_path: pathlib.Path) -> None:
    flash_attn = pytest.importorskip("flash_attn.cute.interface")
    here = pathlib.Path(flash_attn.__file__).parent
    for name in fingerprint.PARTS:
        shutil.copy(here / name, tmp_path / name)
    assert fingerprint.fingerprint(tmp_path) == fingerprint.fingerprint(here)
    known = fingerprint.native_refusal(here, "flash-attn-4 x") is None
    assert (fingerprint.native_refusal(tmp_path, "flash-attn-4 x") is None) == known
    for name, before, after in (
        ("block_info.py", "n_block_min = 0", "n_block_min = 1"),
        ("mask.py", "return col_limit // 8 * 2", "return col_limit // 8 * 4"),
        ("flash_fwd_sm90.py", "mask_seqlen=True", "mask_seqlen=False"),
    ):
        source = (tmp_path / name).read_text()
        assert before in source
        (tmp_path / name).write_text(source.replace(before, after, 1))
        assert "is not one that the native backend was run on" in str(fingerprint.native_refusal(tmp_path, "changed"))
        (tmp_path / name).write_text(source)
    (tmp_path / "mask.py").write_text(
        (tmp_path / "mask.py").read_text().replace("def sm90_col_to_r2p_idx", "def other")
    )
    assert "lacks parts" in str(fingerprint.native_refusal(tmp_path, "changed"))


@pytest.mark.slow
def test_the_backward_is_known_by_what_it_leans_on(tmp_path: pathlib.Path) -> None:
    flash_attn = pytest.importorskip("flash_attn.cute.interface")
    here = pathlib.Path(flash_attn.__file__).parent
    if fingerprint.backward_refusal(here, "this build") is not None:
        pytest.skip("the native backward was not run on this build")
    for name in fingerprint.BACKWARD_PARTS:
        shutil.copy(here / name, tmp_path / name)
    assert fingerprint.backward_refusal(tmp_path, "a copy") is None
    for name, before, after in (
        ("barrier.py", "ld.global.acquire.gpu.b32", "ld.global.relaxed.gpu.b32"),
        ("named_barrier.py", "dQEmptyWG0 = enum.auto()", "dQEmptyWG0 = 9"),
        ("tile_scheduler.py", "block = l2_mod // nheads_in_this_section", "block = l2_mod"),
        ("flash_bwd_sm90.py", "read_flag = const_expr(not self.deterministic)", "read_flag = True"),
    ):
        source = (tmp_path / name).read_text()
        assert before in source
        (tmp_path / name).write_text(source.replace(before, after, 1))
        assert "is not one that the native one was run on" in str(fingerprint.backward_refusal(tmp_path, "changed"))
        (tmp_path / name).write_text(source)
