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
