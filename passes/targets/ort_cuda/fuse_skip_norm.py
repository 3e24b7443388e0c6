"""fuse-skip-norm: a residual sum, its gated bias and the adaptive norm after it become one kernel of ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit, Emitter
from passes.graph.match import MICROSOFT, View, dims, is_op, producer, sole_producer
from passes.graph.pattern import Made, Match
from passes.targets.ort_cuda.per_image import Images, image_of, shaped
from passes.targets.ort_cuda.residuals import is_adaptive_norm, is_full, residual_sum

_FILLING = 2048
"""Tokens that fill a GPU by themselves: over as many, a product of one image takes half the time of one of two."""
_GATED_SUM = Made("Mul", "gate", Made("Add", "value", "bias", sole=True), sole=True)
_SUM_OF_GATED = Made("Add", "value", Made("Mul", "gate", "bias", sole=True), sole=True)


@dataclass(frozen=True)
class SkipNorm:
    """An adaptive norm, and the residual sum before it or, where other norms made that already, their nodes."""

    norm: gs.Node
    total: gs.Node | None
    makers: tuple[gs.Node, ...] = ()


@dataclass
class Terms:
    """What a residual sum adds up: tensors (batch, tokens, channels), gate * (value + bias), and gate * bias."""

    plain: list[gs.Tensor] = field(default_factory=list)
    sums: list[Match] = field(default_factory=list)
    biases: list[Match] = field(default_factory=list)
    """Those of `sums`, too, in the order of the graph."""


@register
@dataclass(frozen=True)
class FuseSkipNorm(Pass):
    """Write an adaptive norm of a residual sum as com.microsoft's SkipLayerNormalization, which gives the sum, too.

        before: LayerNormalization(Add(a, b), scale, shift)
        after:  SkipLayerNormalization(a, b, scale, shift)
        before: LayerNormalization(Add(a, Mul(gate, Add(value, bias))), scale, shift)
        after:  SkipLayerNormalization(a, Mul(gate, value), scale, shift, Mul(gate, bias))

    On the norms that fuse-adaptive-norm leaves. This operator wants vectors for scale and shift, so each image of a
    batch gets one of its own, and what lies between two of them stays apart. Several gated biases become one vector.
    One kernel takes the place of three that read and write every token. A second norm of the same sum makes that sum
    again: it is read in the same kernel. With enough `tokens`, the projections and the feed-forward between two norms
    work image by image as well, which saves joining and cutting.

    Declines when: the batch is not a number (see fix-size); the norm's input is not a sum of two tensors of all tokens;
    the sum is an output or read before the norm; it is of several images over the `short` axis, where more kernels cost
    more than they save.

    Changes numbers: what one kernel does is rounded once.
    """

    name: ClassVar[str] = "fuse-skip-norm"
    tolerance: ClassVar[float] = 1e-3
    short: str = "text"
    """What the graph calls an axis of few tokens."""
    tokens: int = 0
    """Tokens of an image at the sizes that the model is made fast for; 0: unknown."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace norm and sum, where the norm is."""
        edit = Edit(graph)
        images = Images(edit, products=self.tokens >= _FILLING)
        return edit.rewrite_each(self.match, partial(_rewrite, images), "norms")

    def match(self, node: gs.Node, view: View) -> SkipNorm | str | None:
        """The node as an adaptive norm of a residual sum."""
        if not is_adaptive_norm(node):
            return None
        x = node.inputs[0]
        if not isinstance(x.shape[0], (int, np.integer)):
            return "the batch is not a number (see fix-size)"
        if makers := _makers(x):
            return SkipNorm(node, None, makers)
        total = residual_sum(node, view)
        if isinstance(total, str):
            return total
        if x.shape[0] != 1 and any(self.short in dims(t) for t in (*total.inputs, x)):
            return f"several images over the short axis {self.short!r}"
        return SkipNorm(node, total)


def _makers(x: gs.Tensor) -> tuple[gs.Node, ...]:
    """The SkipLayerNormalizations that gave a sum as their fourth output, one for each image; else none."""
    joined = producer(x)
    images = joined.inputs if is_op(joined, "Concat") else [x]
    makers = tuple(producer(image) for image in images)
    for maker, image in zip(makers, images, strict=True):
        if not is_op(maker, "SkipLayerNormalization", domain=(MICROSOFT,)) or image not in maker.outputs[3:]:
            return ()
    return makers if len(makers) == x.shape[0] else ()


def _rewrite(images: Images, found: SkipNorm, edit: Edit) -> None:
    """A kernel for each image, which gives the norm and, where it is not made yet, the sum; then joins of both."""
    norm, new = found.norm, edit.at(found.norm)
    x, *affine = norm.inputs
    if found.total is None:  # the inputs of a kernel: two terms, scale, shift and perhaps a bias
        terms = [[*maker.inputs[:2], *maker.inputs[4:]] for maker in found.makers]
    else:
        terms = _terms(found.total, new, images)
        edit.release(found.total)
    vectors = [images.vectors(tensor, new) for tensor in affine]
    wanted = edit.release(norm) if found.total is None else [*edit.release(norm), x]
    made: list[list[gs.Tensor]] = [[] for _ in wanted]
    for index, (left, right, *bias) in enumerate(terms):
        results = wanted if x.shape[0] == 1 else [image_of(new, tensor) for tensor in wanted]
        # Outputs two and three are statistics that nothing reads.
        outputs = (
            [results[0], *(gs.Variable.empty() for _ in "ab"), *results[1:]] if len(results) > 1 else results
        )
        inputs = [left, right, *(rows[index] for rows in vectors), *bias]
        epsilon = norm.attrs.get("epsilon", 1e-5)
        new.emit_to("SkipLayerNormalization", inputs, outputs, domain=MICROSOFT, epsilon=epsilon)
        for parts, tensor in zip(made, results, strict=True):
            parts.append(tensor)
    if x.shape[0] != 1:
        for parts, tensor in zip(made, wanted, strict=True):
            new.emit_to("Concat", parts, [tensor], axis=0)
            images.made[id(tensor)] = parts


def _terms(total: gs.Node, new: Emitter, images: Images) -> list[list[gs.Tensor]]:
    """Image by image: the two tensors that make the sum and, when a term has a gated bias, that as a vector."""
    terms = Terms()
    for tensor in total.inputs:
        _collect(tensor, terms, new, images)
    big = _add_whole(terms, new, images)
    for found in terms.sums:
        pairs = zip(images.of(found["value"], new), images.of(found["gate"], new), strict=True)
        big.append([shaped(new, "Mul", list(pair), found["value"]) for pair in pairs])
    while len(big) > 2:
        big[:2] = [[shaped(new, "Add", list(pair), pair[0]) for pair in zip(big[0], big[1], strict=True)]]
    biases = [
        [
            new.emit("Mul", [row, found["bias"]], found["bias"].dtype)
            for row in images.vectors(found["gate"], new)
        ]
        for found in terms.biases
    ]
    while len(biases) > 1:
        pairs = zip(biases[0], biases[1], strict=True)
        biases[:2] = [[new.emit("Add", list(pair), pair[0].dtype) for pair in pairs]]
    return [list(item) for item in zip(*big, *biases, strict=True)]


def _collect(tensor: gs.Tensor, terms: Terms, new: Emitter, images: Images) -> None:
    """Take a term apart as far as nothing else reads what is between."""
    edit, view = images.edit, images.edit.view
    found = _gated(_GATED_SUM, tensor, view)
    if found is not None:  # gate * (value + bias) is a term, and so is gate * bias
        edit.remove(*found.nodes)
        edit.rename_after(found["value"], found.nodes[1], new.site)
        terms.sums.append(found)
        terms.biases.append(found)
        return
    found = _gated(_SUM_OF_GATED, tensor, view)
    if found is not None:  # gate * bias is a term, and `value` is made of others
        edit.remove(*found.nodes)
        terms.biases.append(found)
        tensor = found["value"]
    node = sole_producer(tensor, view)
    if is_op(node, "Add") and all(is_full(term, tensor) for term in node.inputs):
        edit.remove(node)
        for term in node.inputs:
            _collect(term, terms, new, images)
    else:
        terms.plain.append(tensor)


def _gated(pattern: Made, tensor: gs.Tensor, view: View) -> Match | None:
    """The tensor by a pattern of gate (batch, 1, channels), value (batch, tokens, channels) and bias [channels]."""
    for found in pattern.fits(tensor, view, Match()):
        gate, value, bias = dims(found["gate"]), dims(found["value"]), dims(found["bias"])
        if isinstance(found["bias"], gs.Constant) and gate[1:] == [1, *bias] and value[2:] == bias:
            return found
    return None


def _add_whole(terms: Terms, new: Emitter, images: Images) -> list[list[gs.Tensor]]:
    """The plain terms image by image; those that are not apart yet are added up first, and cut once."""
    apart = [tensor for tensor in terms.plain if images.comes_apart(tensor)]
    whole = [tensor for tensor in terms.plain if not images.comes_apart(tensor)]
    while len(whole) > 1 and len(apart) + len(whole) + len(terms.sums) > 2:
        whole[:2] = [new.emit("Add", whole[:2], whole[0].dtype, whole[0].shape)]
    return [images.of(tensor, new) for tensor in (*apart, *whole)]
