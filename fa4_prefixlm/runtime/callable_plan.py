"""What every plan is: something to call with tensors, in eager code and in a graph that `torch.compile` made."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Literal, TypeVar, overload

import torch

from fa4_prefixlm.backends.base import Gradients, Prepared
from fa4_prefixlm.backends.select import Choice
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.runtime import torch_ops
from fa4_prefixlm.runtime.execute import Pair, run

Self = TypeVar("Self", bound="CallablePlan")


class CallablePlan(abc.ABC):
    """A prepared batch: `plan(q, k, v)` runs it. Made by `plan` or `serving_plan`.

    Every instance has a `handle` of its own, copies and unpickled ones too: the number by which a compiled graph finds
    it (`torch_ops`).
    """

    handle: torch.Tensor

    def __new__(cls: type[Self], *_: object, **__: object) -> Self:
        made = object.__new__(cls)
        made.handle = torch_ops.register(made)
        return made

    def __setstate__(self, state: Mapping[str, object]) -> None:
        vars(self).update(state, handle=self.handle)

    @property
    @abc.abstractmethod
    def spec(self) -> CallSpec:
        """What the tensors must look like."""

    @property
    @abc.abstractmethod
    def choice(self) -> Choice:
        """The backends, forward and backward, with their reasons."""

    @property
    @abc.abstractmethod
    def prepared(self) -> Prepared:
        """The backend's own state."""

    @abc.abstractmethod
    def gradients(self, deterministic: bool) -> Gradients:
        """The backward's state, made at the first call and reused by every layer."""

    @abc.abstractmethod
    def check(self, spec: CallSpec) -> None:
        """Refuse tensors that the plan was not made for."""

    @overload
    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        return_lse: Literal[False] = ...,
        softmax_scale: float | None = ...,
        softcap: float = ...,
        learnable_sink: torch.Tensor | None = ...,
        out: torch.Tensor | None = ...,
        deterministic: bool | None = ...,
    ) -> torch.Tensor: ...

    @overload
    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        return_lse: Literal[True],
        softmax_scale: float | None = ...,
        softcap: float = ...,
        learnable_sink: torch.Tensor | None = ...,
        out: torch.Tensor | None = ...,
        deterministic: bool | None = ...,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        return_lse: bool = False,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        learnable_sink: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        deterministic: bool | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run the plan on tensors like those it was made for: `attention(q, k, v, plan, ...)`, which see."""
        result, lse = self.pair(q, k, v, softmax_scale, softcap, learnable_sink, out, deterministic)
        return (result, lse) if return_lse else result

    def pair(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None,
        softcap: float,
        learnable_sink: torch.Tensor | None,
        out: torch.Tensor | None,
        deterministic: bool | None = None,
    ) -> Pair:
        """`(out, lse)`, in eager code or while `torch.compile` traces."""
        if torch.compiler.is_compiling():
            options = (softmax_scale, softcap, learnable_sink, out, deterministic)
            return torch_ops.in_graph(q, k, v, self, {}, *options)
        return run(
            self,
            q,
            k,
            v,
            softmax_scale=softmax_scale,
            softcap=softcap,
            learnable_sink=learnable_sink,
            out=out,
            deterministic=deterministic,
        )
