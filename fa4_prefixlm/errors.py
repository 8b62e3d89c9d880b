"""The errors of the border: they name the argument, what was expected and what came."""

from __future__ import annotations


class InputError(ValueError):
    """A call's argument is wrong. Raised before anything is launched.

    Attributes: `argument` (its name, with an index where one element is meant), `expected`, `got`.
    """

    def __init__(self, argument: str, expected: str, got: object) -> None:
        self.argument, self.expected, self.got = argument, expected, got
        super().__init__(f"{argument}: expected {expected}, got {got}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, object]]:
        return type(self), (self.argument, self.expected, self.got)  # so that it crosses process borders


class UnsupportedError(InputError):
    """The arguments make sense, but the asked-for backend can't run this call exactly."""


REPOSITORY = "https://github.com/fa4-prefixlm/fa4_prefixlm"


def install_hint(extra: str) -> str:
    """How to install this library with an extra; no package index has it."""
    cuda = ", for CUDA 13" if extra == "fa4" else ""
    address = f'pip install "fa4_prefixlm[{extra}] @ git+{REPOSITORY}"'
    return f'in a checkout of fa4_prefixlm: pip install -e ".[{extra}]"; without one: {address}{cuda}'
