"""fuse-rms-norm: a root-mean-square norm spelled out in ten operators becomes one RMSNormalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import View, dims, number_of
from passes.graph.pattern import Made, Match

_MEAN = Made("ReduceMean", Made("Pow", Made("Cast", "x", optional=True), "two"), "axes", name="mean")
_INVERSE = Made("Reciprocal", Made("Sqrt", Made("Add", _MEAN, "epsilon")))
_SCALED = Made("Mul", Made("Cast", "x", optional=True), _INVERSE, sole=True)
NORM = Made("Mul", Made("Cast", _SCALED, sole=True, optional=True), "weight")


@register
@dataclass(frozen=True)
class FuseRmsNorm(Pass):
    """Write x / sqrt(mean(x^2) + epsilon) * weight, over the last axis, as RMSNormalization (opset 23).

        before: Mul(Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), epsilon)))), weight)
        after:  RMSNormalization(x, weight)

    With the Casts to float32 and back that torch's exporter puts around it: RMSNormalization computes in float32 as
    well and rounds at the same place, before the weight.

    Declines when: the opset is below 23; the mean is over another axis; the weight is not a constant along the last
    axis, or has another type than x; the power is not 2. A norm whose intermediate values something else reads, from
    the product on, is not looked at.
    """

    name: ClassVar[str] = "fuse-rms-norm"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the last node of each norm; what it alone needed goes with it."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "norms")

    def match(self, node: gs.Node, view: View) -> Match | str | None:
        """The norm that `node`, a product with a weight, ends."""
        reason = None
        for found in NORM.matches(node, view):
            reason = _reason(found) if view.opset >= 23 else f"opset {view.opset} has no RMSNormalization"
            if reason is None:
                return found
        return reason

    def rewrite(self, found: Match, edit: Edit) -> None:
        """One norm in place of the product with the weight."""
        last = found.nodes[0]
        new = edit.at(last)
        inputs, outputs, epsilon = (
            [found["x"], found["weight"]],
            edit.release(last),
            number_of(found["epsilon"]),
        )
        new.emit_to("RMSNormalization", inputs, outputs, axis=-1, epsilon=epsilon, stash_type=1)
        edit.remove(*found.nodes)


def _reason(found: Match) -> str | None:
    """Why a norm of this form must stay."""
    x, weight, mean, product = found["x"], found["weight"], found.node("mean"), found.nodes[0]
    if number_of(found["two"]) != 2 or number_of(found["epsilon"]) is None:
        return "the power is not 2, or epsilon is not a constant"
    rank = len(dims(mean.inputs[0]))
    if number_of(found["axes"]) not in (-1, rank - 1 if rank else -1) or not mean.attrs.get("keepdims", 1):
        return "the mean is not over the last axis, or does not keep it"
    if not isinstance(weight, gs.Constant) or not x.shape or dims(weight) != x.shape[-1:]:
        return "the weight is not a constant along the last axis"
    if x.dtype is None or not x.dtype == weight.dtype == product.outputs[0].dtype:
        return "x, weight and result are not of one type"
    return None
