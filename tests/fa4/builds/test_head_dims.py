"""Head dims that a build takes."""

from __future__ import annotations

import pytest

from fa4_prefixlm.fa4.builds.head_dims import HeadDims


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
