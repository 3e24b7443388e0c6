"""lift-bias: the bias of a MatMul over tokens gets three axes, so that ONNX Runtime leaves it there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import View, bias_add, is_op, is_weight, producer, recipe_of_constant
from passes.weights.recipe import constant


@dataclass(frozen=True)
class Bias:
    """A bias [channels] and the sum that reads it."""

    total: gs.Node
    bias: gs.Tensor


@register
@dataclass(frozen=True)
class LiftBias(Pass):
    """Give the bias of a MatMul of three axes three axes of its own. Exact.

        before: Add(MatMul(x, W), b), b [channels]        after: Add(MatMul(x, W), b), b [1, 1, channels]

    ONNX Runtime joins MatMul and Add to a Gemm where the bias has one axis. Its CUDA Gemm first writes the bias over
    the whole output and then reads that back: in SD3.5-medium on an H200, 9.8 ms a step for the writing alone.

    Declines when: others read the bias as well; its values are not known.
    """

    name: ClassVar[str] = "lift-bias"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the bias by a reshaped one of the same name."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "biases")

    def match(self, node: gs.Node, _view: View) -> Bias | str | None:
        """The bias that an Add gives to a MatMul of three axes."""
        found = bias_add(node)
        if found is None or not is_op(producer(found[0]), "MatMul", rank=3):
            return None
        if len(found[1].outputs) != 1:
            return "others read the bias as well"
        return Bias(node, found[1]) if is_weight(found[1]) else "the values of the bias are not known"

    def rewrite(self, found: Bias, edit: Edit) -> None:
        """The bias in its place, with more axes."""
        lifted = recipe_of_constant(found.bias).reshape((1, 1, int(found.bias.shape[0])))
        edit.replace_input(found.total, found.bias, constant(found.bias.name, lifted))
