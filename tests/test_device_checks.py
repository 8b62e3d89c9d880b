"""The switch that reads device values back."""

from __future__ import annotations

import fa4_prefixlm as fp


def test_the_debug_switch() -> None:
    from fa4_prefixlm import device_checks as switch

    assert not switch.enabled()
    with fp.debug():
        assert switch.enabled()
        with fp.debug(False):
            assert not switch.enabled()
    assert not switch.enabled()
