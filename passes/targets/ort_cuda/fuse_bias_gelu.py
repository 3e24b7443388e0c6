"""fuse-bias-gelu: a bias and the Gelu after it become one kernel of ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import MICROSOFT, View, bias_add, is_op, producer


@dataclass(frozen=True)
class BiasedGelu:
    """Gelu(x + bias): the Gelu, the sum and what it adds up."""

    gelu: gs.Node
    total: gs.Node
    x: gs.Tensor
    bias: gs.Tensor


@register
@dataclass(frozen=True)
class FuseBiasGelu(Pass):
    """Write a Gelu of a sum with a bias as one operator of domain com.microsoft: for ONNX Runtime alone.

        before: Gelu(Add(x, bias))        after: BiasGelu(x, bias); FastGelu(x, bias) where Gelu is approximated by tanh

    Declines when: the bias is not a constant [channels]; something else reads the sum.
    """

    name: ClassVar[str] = "fuse-bias-gelu"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the Gelu; the sum goes."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "pairs")

    def match(self, node: gs.Node, view: View) -> BiasedGelu | str | None:
        """The node as the Gelu of a sum with a bias."""
        total = producer(node.inputs[0]) if is_op(node, "Gelu") else None
        if not is_op(total, "Add"):
            return None
        found = bias_add(total)
        if found is None:
            return "what is added before it is not a constant bias [channels]"
        if not view.is_sole(node.inputs[0]):
            return "something else reads the sum before it"
        return BiasedGelu(node, total, *found)

    def rewrite(self, found: BiasedGelu, edit: Edit) -> None:
        """One node for both."""
        edit.rename_after(found.x, found.total, found.gelu)
        op = "FastGelu" if found.gelu.attrs.get("approximate", "none") == "tanh" else "BiasGelu"
        new = edit.at(found.gelu)
        new.emit_to(op, [found.x, found.bias], edit.release(found.gelu), domain=MICROSOFT)
        edit.remove(found.total)
