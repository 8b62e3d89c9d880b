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
