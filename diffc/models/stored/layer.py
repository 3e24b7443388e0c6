"""One quantized layer while it is read: its tensors, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from diffc.errors import UnsupportedError
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe

FLOAT = int(TensorProto.FLOAT)
E4M3 = int(TensorProto.FLOAT8E4M3FN)


@dataclass(frozen=True)
class Layer:
    """`own`: its tensors by what follows its name. `told`: what ComfyUI says of it, such as {"format": "nvfp4"}.

    `comfyui`: whether 4-bit codes and block scales are laid out as ComfyUI has them; None where nothing says so.
    """

    name: str
    own: Mapping[str, Recipe]
    bias: Recipe | None
    algorithm: str
    told: Mapping[str, Any]
    comfyui: bool | None

    @property
    def weight(self) -> Recipe:
        """The tensor of codes."""
        return self.own["weight"]

    def scalar(self, name: str) -> Recipe | None:
        """A tensor of one element as a float32 scalar; None when there is none."""
        found = self.own.get(name)
        if found is None:
            return None
        if found.shape not in ((), (1,), (1, 1)):
            raise UnsupportedError(
                f"{self.name}.{name} has shape {list(found.shape)}, and one number is expected",
                fix="download the model again",
            )
        return found.cast(FLOAT).reshape(()) if found.shape else found.cast(FLOAT)

    def number(self, name: str) -> float | None:
        """The value of such a tensor."""
        found = self.scalar(name)
        return None if found is None else float(np.asarray(evaluate(found)).astype(np.float32))

    def refuse(self, what: str, fix: str = "give the model in 16 bits") -> UnsupportedError:
        """The error for a layer that diffc does not read."""
        return UnsupportedError(f"{self.name} is quantized {what}, which diffc does not read", fix=fix)
