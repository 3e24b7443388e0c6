"""fuse-shared-norm: a residual sum and a norm with the same scale for all images become one kernel of ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx.helper import tensor_dtype_to_np_dtype

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import MICROSOFT, View, bias_add, dims, is_channel_norm, sole_producer
from passes.targets.ort_cuda.residuals import is_adaptive_norm, residual_sum
from passes.weights.recipe import dtype_of


@dataclass(frozen=True)
class SharedNorm:
    """A norm, the residual sum that it normalizes, the sum's terms, and the sum of one of them with a constant bias."""

    norm: gs.Node
    total: gs.Node
    terms: tuple[gs.Tensor, ...]
    biased: gs.Node | None = None


@register
@dataclass(frozen=True)
class FuseSharedNorm(Pass):
    """Write a norm of a residual sum as com.microsoft's SkipLayerNormalization, which gives the sum, too.

        before: LayerNormalization(Add(a, b), scale, shift), scale and shift constants [channels]
        after:  SkipLayerNormalization(a, b, scale, shift)
        before: LayerNormalization(Add(a, Add(value, bias)), scale, shift), all but a and value constants [channels]
        after:  SkipLayerNormalization(a, value, scale, shift, bias)
        before: LayerNormalization(Add(a, b), scale, shift), scale and shift computed, (batch, 1, channels)
        after:  Add(Mul(SkipLayerNormalization(a, b, ones), scale), shift)

    The last on the norms over the `short` axis that fuse-skip-norm leaves: ONNX Runtime's LayerNormalization takes
    15 us on an H200 however few the tokens are, this operator and the two others together 11.

    Declines when: the norm's input is not a sum of two tensors of all tokens; the sum is an output or read before the
    norm.

    Changes numbers: what one kernel does is rounded once, and what an adaptive norm did is rounded three times.
    """

    name: ClassVar[str] = "fuse-shared-norm"
    tolerance: ClassVar[float] = 1e-3
    short: str = "text"
    """What the graph calls an axis of few tokens."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace norm and sum, where the norm is."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "norms")

    def match(self, node: gs.Node, view: View) -> SharedNorm | str | None:
        """The node as a norm of a residual sum."""
        shared = _is_shared(node)
        if not shared and not (is_adaptive_norm(node) and node.inputs[0].shape[1] == self.short):
            return None
        total = residual_sum(node, view)
        if isinstance(total, str):
            return total
        for term, other in (total.inputs, total.inputs[::-1]) if shared else ():
            biased = sole_producer(term, view)
            if (found := bias_add(biased)) is not None:
                return SharedNorm(node, total, (other, *found), biased)
        return SharedNorm(node, total, tuple(total.inputs))

    def rewrite(self, found: SharedNorm, edit: Edit) -> None:
        """One kernel that gives the norm and the sum; for an adaptive norm, scale and shift after it."""
        new, (x, *affine) = edit.at(found.norm), found.norm.inputs
        (output,), (left, right, *bias) = edit.release(found.norm), found.terms
        if found.biased is not None:
            edit.rename_after(right, found.biased, found.norm)
            edit.remove(found.biased)
        edit.release(found.total)
        shared = isinstance(affine[0], gs.Constant)
        if not shared:  # a scale of ones; remove-unused lets all of a width and type be one
            kind = tensor_dtype_to_np_dtype(dtype_of(x) or 0)
            scales = [new.constant("ones", np.ones(int(x.shape[2]), kind))]
            normed = gs.Variable(new.names.fresh(f"{found.norm.name}/normed"), x.dtype, list(x.shape))
        else:
            scales, normed = affine, output
        if bias and len(scales) == 1:
            scales = [
                *scales,
                gs.Variable.empty(),
            ]  # the bias is the fifth input, after a shift that is not there
        # Outputs two and three are statistics that nothing reads.
        outputs = [normed, gs.Variable.empty(), gs.Variable.empty(), x]
        epsilon = found.norm.attrs.get("epsilon", 1e-5)
        inputs = [left, right, *scales, *bias]
        new.emit_to("SkipLayerNormalization", inputs, outputs, domain=MICROSOFT, epsilon=epsilon)
        if not shared:
            scaled = new.emit("Mul", [normed, affine[0]], x.dtype, x.shape)
            new.emit_to("Add", [scaled, affine[1]], [output])


def _is_shared(node: gs.Node) -> bool:
    """Whether the node is a norm of (batch, tokens, channels) over its channels, with constant scale and shift."""
    if not is_channel_norm(node):
        return False
    x, *affine = node.inputs
    return all(isinstance(t, gs.Constant) and dims(t) == [x.shape[2]] and t.dtype == x.dtype for t in affine)
