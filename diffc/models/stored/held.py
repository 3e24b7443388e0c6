"""A layer as a file holds it: codes and scales of its weight, and what happens to its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from passes.weights.recipe import Recipe, bits_of


@dataclass(frozen=True)
class HeldInput:
    """How a layer's input is quantized: `kind` as in `diffc.quantize.kinds`, and the scale, None where it has none.

    `scale` is that of the whole tensor, float32: what codes are multiplied with.
    """

    kind: str
    scale: Recipe | None = None


@dataclass(frozen=True)
class Held:
    """One layer. `kind` says what the weight's codes are: "fp8", "int8", "int4", "nvfp4" or "mxfp8".

    `weight` is what the codes stand for, float32: its last operation is the dequantization. `input` None leaves the
    input as it is. The input is first multiplied by `pre_quant_scale` [in], which the weight has been divided by.
    `low_rank` (a [rank, in], b [out, rank]) is a branch beside the weight, on the same input.
    """

    kind: str
    weight: Recipe
    input: HeldInput | None = None
    pre_quant_scale: Recipe | None = None
    low_rank: tuple[Recipe, Recipe] | None = None

    @property
    def effective(self) -> Recipe:
        """The weight that the layer has for its own input: branch added, factors multiplied in; float32."""
        weight = self.weight
        if self.low_rank is not None:
            a, b = (part.cast(TensorProto.FLOAT) for part in self.low_rank)
            weight = weight.subtract_product(b.multiply(_MINUS), a)
        if self.pre_quant_scale is not None:
            factor = self.pre_quant_scale.cast(TensorProto.FLOAT)
            weight = weight.multiply(factor.reshape((1, *factor.shape)))
        return weight


@dataclass(frozen=True)
class Decoded:
    """The tensors of a file once scales are out of the way: every weight by its name there, and the layers held."""

    weights: Mapping[str, Recipe]
    held: Mapping[str, Held] = field(default_factory=dict)

    def kinds(self) -> dict[str, int]:
        """How many layers there are of each kind, in the order of kinds."""
        names = sorted({layer.kind for layer in self.held.values()})
        return {name: sum(layer.kind == name for layer in self.held.values()) for name in names}


def compute_dtype(weights: Mapping[str, Recipe], held: Mapping[str, Held]) -> str:
    """The type to compute in: that of most plain matrices, else of most plain 16-bit tensors; bfloat16 where all are
    quantized."""
    plain = [recipe for name, recipe in weights.items() if name.removesuffix(".weight") not in held]
    for chosen in ([r for r in plain if len(r.shape) > 1], plain):
        types = [r.dtype for r in chosen if r.dtype in _NAMES]
        if types:
            return _NAMES[max(set(types), key=types.count)]
    narrow = any(bits_of(recipe.dtype) < 16 for recipe in plain) or bool(held)
    return "bfloat16" if narrow else "float32"


_NAMES = {int(TensorProto.FLOAT16): "float16", int(TensorProto.BFLOAT16): "bfloat16"}
_MINUS = Recipe.of_array(np.array(-1.0, np.float32))
