"""fuse-adaptive-norm: scale and shift after a LayerNormalization become its own scale and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import View, array_of, is_channel_norm, is_per_image
from passes.graph.pattern import Made, Match

ADAPTIVE = Made(
    "Add",
    Made("Mul", Made("LayerNormalization", "x", "ones", ..., name="normed"), "scale", sole=True),
    "shift",
)


@register
@dataclass(frozen=True)
class FuseAdaptiveNorm(Pass):
    """Let a LayerNormalization take in the scale and shift that diffusion transformers compute for each image.

        before: Add(Mul(LayerNormalization(x, ones), scale), shift)        after: LayerNormalization(x, scale, shift)

    x is (batch, tokens, channels), scale and shift are (batch, 1, channels). ONNX lets them broadcast;
    ONNX Runtime has kernels for it, TensorRT has not. A norm that several pairs scale is computed for each: that reads
    x twice, where two more operators would read and write it.

    Declines when: the norm has a scale other than ones, a bias or another axis; scale or shift have another shape or
    type. A product that something else reads is not looked at.

    The result is not rounded between norm, product and sum: 16-bit outputs differ in their last bits.
    """

    name: ClassVar[str] = "fuse-adaptive-norm"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the sum; product and norm go when nothing else reads them."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "norms")

    def match(self, node: gs.Node, view: View) -> Match | str | None:
        """The node as the sum that ends an adaptive norm."""
        reason = None
        for found in ADAPTIVE.matches(node, view):
            reason = _reason(found)
            if reason is None:
                return found
        return reason

    def rewrite(self, found: Match, edit: Edit) -> None:
        """One norm; its value is that of the module of the sum."""
        total, norm = found.nodes[0], found.node("normed")
        attrs = {**norm.attrs, "axis": 2}  # ONNX Runtime's kernels broadcast for this axis, so written
        new = edit.at(total)
        inputs = [found["x"], found["scale"], found["shift"]]
        new.emit_to("LayerNormalization", inputs, edit.release(total), **attrs)
        edit.remove(*found.nodes)


def _reason(found: Match) -> str | None:
    norm, x, ones = found.node("normed"), found["x"], array_of(found["ones"])
    if not is_channel_norm(norm) or any(not tensor.is_empty() for tensor in norm.inputs[2:]):
        return "the norm has a bias of its own, or is not over the last of three axes"
    if ones is None or not np.all(ones == 1):
        return "the norm has a scale of its own"
    if not all(is_per_image(found[name], x) and found[name].dtype == x.dtype for name in ("scale", "shift")):
        return "scale and shift are not (batch, 1, channels) in the type of the norm"
    return None
