"""Operations of torch, counted."""

from __future__ import annotations

from collections.abc import Collection

from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """Within it, `names` gets the name of every operation. besides: names of those that are not counted."""

    def __init__(self, besides: Collection[str] = ()) -> None:
        super().__init__()
        self.names: list[str] = []
        self.besides = besides

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.besides:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
