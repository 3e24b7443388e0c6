"""Initializers of a traced graph -> recipes over the files that hold the real values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from diffc.errors import DiffcError
from diffc.frontend.quantizers import TracedQuantizer
from diffc.models.sources.source import ModelSource
from diffc.quantize.checkpoint import Checkpoint
from passes.weights.recipe import Recipe
from passes.weights.sources import keep


def attach_recipes(
    model: ir.Model,
    source: ModelSource,
    traced: Mapping[str, TracedQuantizer],
    checkpoint: Checkpoint | None,
) -> None:
    """Give every fake initializer its recipe: a weight of `source` cast to its type, or amax / bound.

    A weight that the checkpoint carries comes from there, and is not scaled again.
    Raises DiffcError that names a tensor which neither the weights nor the checkpoint have.
    """
    for name, value in model.graph.initializers.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "scale" and path in traced and checkpoint is not None:
            recipe = _scale(traced[path], checkpoint.amax[path])
        elif checkpoint is not None and (values := scaling_of(name, checkpoint)) is not None:
            recipe = keep(values)
        elif checkpoint is not None and name in checkpoint.weights:
            recipe = checkpoint.weights[name]
        elif name in source.weights:
            recipe = source.weights[name]
            if checkpoint is not None and leaf == "weight":
                recipe = scaled_weight(recipe.cast(_element_type(value)), path, checkpoint)
        elif is_real(value):
            continue
        else:
            raise DiffcError(
                f"the weights of {source.name} have no tensor {name!r}, which the model needs",
                fix="check that config.json and the safetensors files belong together",
            )
        recipe = recipe.cast(_element_type(value))
        if list(recipe.shape) != list(value.shape or ()):
            raise DiffcError(
                f"tensor {name!r} has shape {recipe.shape}, and config.json asks for {value.shape}",
                fix="take config.json and weights of the same model",
            )
        value.const_value = ir.serde.TensorProtoTensor(recipe.to_tensor(name))


def _element_type(value: ir.Value) -> int:
    if value.dtype is None:
        raise RuntimeError(f"initializer {value.name} has no type")
    return int(value.dtype)


def is_real(value: ir.Value) -> bool:
    """Whether an initializer has values in the trace, as constants have that the exporter made."""
    raw = getattr(value.const_value, "raw", None)
    return raw is not None and not isinstance(raw, torch._subclasses.fake_tensor.FakeTensor)


def scaling_of(name: str, checkpoint: Checkpoint) -> npt.NDArray[np.float32] | None:
    """Values of a quantizer's buffer: `a.input_quantizer._pre_quant_scale`, `a.weight_quantizer._svdquant_lora_b`."""
    path, _, leaf = name.rpartition(".")
    return checkpoint.scaling.get(f"{path}.{leaf.removeprefix('_')}")


def scaled_weight(weight: Recipe, layer: str, checkpoint: Checkpoint) -> Recipe:
    """The weight of `layer` changed as `diffc.quantize.scaling.apply_scaling` does: divided, and less its branch."""
    if not checkpoint.scales_weights:
        return weight
    scaling = checkpoint.scaling
    factor = scaling.get(f"{layer}.input_quantizer.pre_quant_scale")
    if factor is not None:
        weight = weight.multiply(keep((np.float32(1) / factor).reshape(1, -1)))
    branch = f"{layer}.weight_quantizer.svdquant_lora_"
    if f"{branch}a" in scaling:
        weight = weight.subtract_product(keep(scaling[f"{branch}b"]), keep(scaling[f"{branch}a"]))
    return weight


def _scale(quantizer: TracedQuantizer, amax: npt.NDArray[np.float32]) -> Recipe:
    """The scale, amax / bound, in its own shape."""
    return quantizer.kind.scale_recipe(amax.astype(np.float32).reshape(quantizer.shape or ()))
