"""fuse-lora: a LoRA file is added to the weights of a model whose layers have their torch names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassError, PassResult, Refusal, register
from passes.graph.edit import Names, drop_nodes
from passes.graph.match import View, producer
from passes.graph.modules import Parameter, parameters_of
from passes.weights.lora.changes import Change, fused
from passes.weights.lora.file import AdapterFile
from passes.weights.lora.fuse import apply_files, changes_by_parameter
from passes.weights.lora.match import Strength
from passes.weights.recipe import Recipe, constant


@register
@dataclass(frozen=True)
class FuseLora(Pass):
    """Add the differences of an adapter file (LoRA, LoCon, LoHa, LoKr, DoRA, whole differences) to the weights.

        before: MatMul(x, W)        after: MatMul(x, W + weight * alpha / rank * (B A) transposed)

    Layers are found by the names of their weights (`a.b.weight`), otherwise by the paths of their nodes (`a.b/MatMul`,
    `/a/b/MatMul`). Sums are made in float32 and rounded once to the type that the node reads. A layer whose weight the
    file has been added to already stays as it is.

    Raises PassError when the file does not fit: a layer is not in the graph, has other sizes, or is quantized already
    (add the LoRA before quantizing); with `partial`, what does not fit is left out.

    Changes numbers, as it is meant to.
    """

    name: ClassVar[str] = "fuse-lora"
    tolerance: ClassVar[float] = float("inf")
    file: str = ""
    """A .safetensors file; without one nothing changes."""
    weight: float = 1.0
    """How strongly the file counts."""
    layers: tuple[str, ...] = ()
    """Weights of single layers, as PATTERN:WEIGHT; the last pattern that matches counts."""
    partial: bool = False
    """Leave out what does not fit."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Give every weight that the file changes a recipe that adds the difference."""
        if not self.file:
            return PassResult()
        found: dict[str, list[Parameter]] = {}
        for parameter in parameters_of(graph):
            found.setdefault(parameter.name, []).append(parameter)
        shapes = {name: same[0].shape for name, same in found.items()}
        path = Path(self.file).expanduser().absolute()
        (applied,) = apply_files([(path, self._strength())], shapes, partial=self.partial)
        names, changed, refusals, dead = Names(graph), 0, list[Refusal](), set[int]()
        outputs = View(graph).outputs
        for name, wanted in changes_by_parameter([applied]).items():
            for parameter in found[name]:
                if parameter.recipe is None:
                    refusals.append(self._quantized(parameter))
                else:
                    old = parameter.node.inputs[parameter.index]
                    changed += _fuse(parameter, parameter.recipe, wanted, names, applied.file)
                    dead |= _unread(old, outputs)
        drop_nodes(graph, dead)
        return PassResult(changed, (applied.summary(),) if changed else (), tuple(refusals))

    def _quantized(self, parameter: Parameter) -> Refusal:
        """The refusal of a weight that is quantized. Raises PassError unless some of the file may be left out."""
        if not self.partial:
            raise PassError(
                f"fuse-lora: {parameter.name} is quantized already, which takes no sum. Fix: fuse the LoRA before the"
                " model is quantized (diffc compile --lora), or give partial=true to leave such layers as they are"
            )
        return Refusal(parameter.node.name, f"{parameter.name} is quantized already")

    def _strength(self) -> Strength:
        try:
            pairs = [(text.rpartition(":")[0], float(text.rpartition(":")[2])) for text in self.layers]
        except ValueError as error:
            raise PassError(
                f"layers={';'.join(self.layers)} is not PATTERN:WEIGHT;PATTERN:WEIGHT"
                ". Fix: write layers=PATTERN:WEIGHT"
            ) from error
        return Strength(self.weight, tuple(pairs))


def _unread(tensor: gs.Tensor, outputs: set[int]) -> set[int]:
    """The `id()` of the nodes before a tensor that nothing reads any more."""
    node = producer(tensor)
    if tensor.outputs or node is None or id(tensor) in outputs:
        return set()
    return {id(node)}


def _fuse(
    parameter: Parameter, recipe: Recipe, changes: Sequence[Change], names: Names, file: AdapterFile
) -> int:
    """Let the node read the changed weight; 0 when the file is in it already."""
    if any(source.path == str(file.path) for source in recipe.sources):
        return 0
    turned = recipe.transpose((1, 0)) if parameter.transposed else recipe
    result = fused(turned, changes)
    if parameter.transposed:
        result = result.transpose((1, 0))
    new = constant(names.fresh(parameter.name), result.cast(parameter.dtype))
    parameter.node.inputs[parameter.index] = new
    return 1
