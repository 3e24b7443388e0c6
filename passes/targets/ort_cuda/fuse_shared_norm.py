"""fuse-shared-norm: a residual sum and a norm with the same scale for all images become one kernel of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx.helper import tensor_dtype_to_np_dtype

from passes.base import Pass, PassResult, register
from passes.graph.edit import Emitter, Names, rename_after, replace_groups
from passes.graph.match import is_bias, output_ids, producer, sole_producer
from passes.targets.ort_cuda.flatten_attention import MICROSOFT
from passes.targets.ort_cuda.fuse_skip_norm import residual_sum, scale_by_image
from passes.weights.recipe import dtype_of

Found = tuple[gs.Node, gs.Node]
"""A norm, and the sum that it normalizes."""


@register
@dataclass(frozen=True)
class FuseSharedNorm(Pass):
    """Write LayerNormalization(a + b, scale, shift) as com.microsoft's SkipLayerNormalization, which gives a + b, too.

    Fires where scale and shift are constants, [channels]; a constant bias of a or b goes into the operator. And on the
    adaptive norms over the `short` axis that fuse-skip-norm leaves: those get a scale of ones, with a product and a
    sum behind it. ONNX Runtime's LayerNormalization takes 15 us on an H200 however few the tokens are, this operator
    and the two others together 11.

    Changes numbers: what one kernel does is rounded once, and what an adaptive norm did is rounded three times.
    """

    name: ClassVar[str] = "fuse-shared-norm"
    tolerance: ClassVar[float] = 1e-3
    short: str = "text"
    """What the graph calls an axis of few tokens."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace norm and sum, where the norm is."""
        names, kept = Names(graph), output_ids(graph)

        def fuse(group: Sequence[Found], new: dict[int, list[gs.Node]], dead: set[int]) -> None:
            for node, total in group:
                new[id(node)] = _fuse(node, total, Emitter(node, names), kept, dead)

        changed = replace_groups(graph, lambda part: self._found(part, kept), fuse)
        return PassResult(changed, (f"{changed} norms",) if changed else ())

    def _found(self, graph: gs.Graph, kept: set[int]) -> Iterator[list[Found]]:
        place = {id(node): index for index, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if _is_shared(node) or self._is_few(node):
                total = residual_sum(node, place, kept, set())
                if total is not None:
                    yield [(node, total)]

    def _is_few(self, node: gs.Node) -> bool:
        """Whether the node is an adaptive norm over few tokens."""
        return scale_by_image(node) and node.inputs[0].shape[1] == self.short


def _is_shared(node: gs.Node) -> bool:
    """Whether the node is a norm of (batch, tokens, channels) over its channels, with constant scale and shift."""
    if node.op != "LayerNormalization" or len(node.outputs) != 1:
        return False
    x, *affine = node.inputs
    if len(x.shape or ()) != 3 or node.attrs.get("axis", -1) not in (-1, 2):
        return False
    return all(
        isinstance(t, gs.Constant) and list(t.shape) == [x.shape[2]] and t.dtype == x.dtype for t in affine
    )


def _ones(like: gs.Tensor, new: Emitter) -> gs.Constant:
    """A scale of ones; remove-unused lets all of a width and type be one."""
    dtype = dtype_of(like)
    assert dtype is not None  # of what a traced or typed graph computes
    return new.constant("ones", np.ones(int(like.shape[2]), tensor_dtype_to_np_dtype(dtype)))


def _fuse(node: gs.Node, total: gs.Node, new: Emitter, kept: set[int], dead: set[int]) -> list[gs.Node]:
    """The nodes that take the place of a norm and of the sum that it normalizes."""
    x, *affine = node.inputs
    shared = isinstance(affine[0], gs.Constant)
    (output,) = node.outputs
    terms, bias = _without_bias(total, new, kept, dead) if shared else (list(total.inputs), [])
    total.outputs.clear()
    node.outputs.clear()
    dead |= {id(total), id(node)}
    scales = affine if shared else [_ones(x, new)]
    if bias and len(scales) == 1:
        scales = [*scales, gs.Variable.empty()]
    normed = output if shared else gs.Variable(new.names.fresh(f"{node.name}/normed"), dtype=x.dtype)
    outputs = [normed, gs.Variable.empty(), gs.Variable.empty(), x]
    epsilon = node.attrs.get("epsilon", 1e-5)
    new.emit_to("SkipLayerNormalization", [*terms, *scales, *bias], outputs, epsilon=epsilon)
    new.nodes[-1].domain = MICROSOFT
    if not shared:
        scaled = new.emit("Mul", [normed, affine[0]], x.dtype)
        normed.shape = scaled.shape = list(x.shape)
        new.emit_to("Add", [scaled, affine[1]], [output])
    return new.nodes


def _without_bias(
    total: gs.Node, new: Emitter, kept: set[int], dead: set[int]
) -> tuple[list[gs.Tensor], list[gs.Tensor]]:
    """The two terms of a sum, and the constant bias [channels] of one of them, taken from it."""
    for term, other in (total.inputs, total.inputs[::-1]):
        inner = sole_producer(term, kept)
        for value, bias in (
            (inner.inputs, inner.inputs[::-1]) if inner is not None and inner.op == "Add" else ()
        ):
            if is_bias(bias, term):
                rename_after(producer(value), inner, new.site, new.names, kept)
                dead.add(id(inner))
                return [other, value], [bias]
    return list(total.inputs), []
