"""Complex rotary tables as pairs of real numbers, for the time of a trace: ONNX has no complex numbers.

before: view_as_real(view_as_complex(x) * table)      after: the same products and sums of real and imaginary parts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn


class Pair:
    """A complex tensor as a real one with a last axis of 2, and those operations that rotary embeddings use."""

    def __init__(self, real: torch.Tensor):
        self.real = real

    @property
    def shape(self) -> torch.Size:
        """The shape of the complex tensor."""
        return self.real.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.real.device

    def dim(self) -> int:
        """The number of axes of the complex tensor."""
        return self.real.dim() - 1

    def __getitem__(self, index: Any) -> Pair:
        parts = index if isinstance(index, tuple) else (index,)
        return Pair(self.real[(*parts, slice(None))] if Ellipsis in parts else self.real[parts])

    def __mul__(self, other: Any) -> Pair:
        if not isinstance(other, Pair):
            return Pair(self.real * (other[..., None] if isinstance(other, torch.Tensor) else other))
        a, b = self.real.unbind(-1)
        c, d = other.real.unbind(-1)
        return Pair(torch.stack([a * c - b * d, a * d + b * c], -1))

    __rmul__ = __mul__

    def to(self, *args: Any, **kwargs: Any) -> Pair:
        """On another device; complex types are left alone."""
        kept = [a for a in args if not isinstance(a, torch.dtype)]
        kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
        return Pair(self.real.to(*kept, **kwargs)) if kept or kwargs else self

    def view(self, *shape: Any) -> Pair:
        """As of a tensor."""
        return Pair(self.real.view(*_sizes(shape), 2))

    def reshape(self, *shape: Any) -> Pair:
        """As of a tensor."""
        return Pair(self.real.reshape(*_sizes(shape), 2))

    def expand(self, *shape: Any) -> Pair:
        """As of a tensor."""
        return Pair(self.real.expand(*_sizes(shape), 2))

    def repeat(self, *times: Any) -> Pair:
        """As of a tensor."""
        return Pair(self.real.repeat(*_sizes(times), 1))

    def unsqueeze(self, dim: int) -> Pair:
        """As of a tensor."""
        return Pair(self.real.unsqueeze(dim if dim >= 0 else dim - 1))

    def flatten(self, start: int = 0, end: int = -1) -> Pair:
        """As of a tensor."""
        return Pair(self.real.flatten(self._axis(start), self._axis(end)))

    def split(self, sizes: Any, dim: int = 0) -> list[Pair]:
        """As of a tensor."""
        return [Pair(part) for part in torch.split(self.real, sizes, self._axis(dim))]

    def clone(self) -> Pair:
        """As of a tensor."""
        return Pair(self.real.clone())

    def contiguous(self) -> Pair:
        """As of a tensor."""
        return Pair(self.real.contiguous())

    def _axis(self, dim: int) -> int:
        return dim if dim >= 0 else dim + self.dim()

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.view_as_real:
            return args[0].real
        if function in (torch.cat, torch.concat):
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            return Pair(torch.cat([part.real for part in args[0]], args[0][0]._axis(dim)))
        raise NotImplementedError(f"{function.__name__} of complex numbers in a trace")


def _sizes(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape


@contextmanager
def complex_as_pairs(backbone: nn.Module) -> Iterator[None]:
    """While open, complex tables of `backbone` (changed in place) are pairs, and so is what view_as_complex makes."""
    for module in backbone.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_complex():
                delattr(module, name)
                setattr(module, name, buffer)  # a plain attribute, converted below
        for name, value in list(vars(module).items()):
            if name not in ("_modules", "_parameters", "_buffers"):
                module.__dict__[name] = _paired(value)
    with patch.object(torch, "view_as_complex", Pair):
        yield


def _paired(value: Any) -> Any:
    """`value` with pairs in the place of complex tensors, in lists, tuples and dictionaries as well."""
    if isinstance(value, torch.Tensor):
        return Pair(torch.view_as_real(value)) if value.is_complex() else value
    if type(value) in (list, tuple):
        return type(value)(_paired(item) for item in value)
    if type(value) is dict:
        return {key: _paired(item) for key, item in value.items()}
    return value
