"""fuse-skip-norm: a residual sum, its gated bias and the adaptive norm behind it become one kernel of ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register, walk
from passes.flatten_attention import MICROSOFT
from passes.graphs import Emitter, Names, drop_nodes, hand_over, output_ids, producer, splice


class Gated(NamedTuple):
    """gate * (value + bias): the product and the sum."""

    product: gs.Node
    total: gs.Node
    gate: gs.Tensor
    value: gs.Tensor
    bias: gs.Tensor


@register
@dataclass(frozen=True)
class FuseSkipNorm(Pass):
    """Write LayerNormalization(a + b, scale, shift) as com.microsoft's SkipLayerNormalization, which gives a + b, too.

    Fires on the adaptive norms that fuse-adaptive-norm leaves, where the batch is a number (see fix-size): this
    operator wants vectors for scale and shift, so each image of a batch gets one of its own, and what lies between two
    of them stays apart. Where b is gate * (value + bias), the bias goes into the operator as gate * bias. One kernel
    takes the place of three that read and write every token. A sum whose other readers come before the norm stays, and
    so do those of several images over few tokens, where more kernels cost more than they save.

    Changes numbers: what one kernel does is rounded once.
    """

    name: ClassVar[str] = "fuse-skip-norm"
    tolerance: ClassVar[float] = 1e-3
    short: str = "text"
    """What the graph calls an axis of few tokens."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace norm and sum, where the norm is."""
        names, images = Names(graph), Images(output_ids(graph))
        changed = 0
        for part in walk(graph):
            place = {id(node): index for index, node in enumerate(part.nodes)}
            new: dict[int, list[gs.Node]] = {}
            for node in part.nodes:
                total = _sum(node, place, images)
                if total is not None and (total.outputs[0].shape[0] == 1 or not self._is_short(total)):
                    new[id(node)] = _fuse(node, total, Emitter(node, names), images)
                    changed += 1
            splice(part, new)
        drop_nodes(graph, images.dead)
        return PassResult(changed, (f"{changed} norms",) if changed else ())

    def _is_short(self, total: gs.Node) -> bool:
        return any(self.short in (tensor.shape or ()) for tensor in (*total.inputs, *total.outputs))


@dataclass
class Images:
    """The images of a batch as tensors of their own, each made once; nodes that are replaced by such are `dead`."""

    kept: set[int]
    dead: set[int] = field(default_factory=set)
    made: dict[int, list[gs.Tensor]] = field(default_factory=dict)
    rows: dict[int, list[gs.Tensor]] = field(default_factory=dict)

    def of(self, tensor: gs.Tensor, new: Emitter) -> list[gs.Tensor]:
        """A tensor (batch, tokens, channels) image by image; sums and products that it alone needs are taken apart."""
        if tensor.shape[0] == 1:
            return [tensor]
        if id(tensor) not in self.made:
            self.made[id(tensor)] = self._made(tensor, new)
        return self.made[id(tensor)]

    def _made(self, tensor: gs.Tensor, new: Emitter) -> list[gs.Tensor]:
        node = producer(tensor)
        alone = node is not None and len(tensor.outputs) == 1 and id(tensor) not in self.kept
        if node is not None and alone and node.op in ("Add", "Mul") and all(_varies(t) for t in node.inputs):
            self.dead.add(id(node))
            terms = zip(*(self.of(t, new) for t in node.inputs), strict=True)
            return [_shaped(new, node.op, list(pair), tensor) for pair in terms]
        return _cut(tensor, new)

    def vectors(self, tensor: gs.Tensor, new: Emitter) -> list[gs.Tensor]:
        """A tensor (batch, 1, channels) as a vector for each image."""
        if id(tensor) not in self.rows:
            flat = new.constant("vector", np.array([-1], np.int64))
            self.rows[id(tensor)] = [
                new.emit("Reshape", [row, flat], tensor.dtype) for row in self.of(tensor, new)
            ]
        return self.rows[id(tensor)]


def _cut(tensor: gs.Tensor, new: Emitter) -> list[gs.Tensor]:
    """The images of a tensor that is computed for all at once."""
    parts = [_image(new, tensor) for _ in range(tensor.shape[0])]
    if tensor.shape[1] == 1:  # small: one kernel that writes all parts
        new.emit_to("Split", [tensor], parts, axis=0, num_outputs=len(parts))
        return parts
    bounds = [new.constant(f"image_{i}", np.array([i], np.int64)) for i in range(len(parts) + 1)]
    for part, (start, end) in zip(parts, pairwise(bounds), strict=True):  # each a copy of one piece of memory
        new.emit_to("Slice", [tensor, start, end, bounds[0]], [part])
    return parts


def _varies(tensor: gs.Tensor) -> bool:
    return not isinstance(tensor, gs.Constant) and len(tensor.shape or ()) == 3 and tensor.shape[0] != 1


def _shaped(new: Emitter, op: str, inputs: list[gs.Tensor], like: gs.Tensor) -> gs.Tensor:
    """An operator on one image of `like`."""
    out = new.emit(op, inputs, like.dtype)
    out.shape = [1, *like.shape[1:]]
    return out


def _sum(node: gs.Node, place: dict[int, int], images: Images) -> gs.Node | None:
    """The residual sum that the node, an adaptive norm of known batch, normalizes; None when it must stay."""
    if node.op != "LayerNormalization" or node.attrs.get("axis", -1) not in (-1, 2) or len(node.inputs) != 3:
        return None
    x, scale, shift = node.inputs
    shape = x.shape
    if (
        shape is None
        or len(shape) != 3
        or not isinstance(shape[0], (int, np.integer))
        or len(node.outputs) != 1
    ):
        return None
    per_image = [shape[0], 1, shape[2]]
    if any(list(t.shape or ()) != per_image or isinstance(t, gs.Constant) for t in (scale, shift)):
        return None
    total = producer(x)
    if total is None or total.op != "Add" or id(total) in images.dead or id(x) in images.kept:
        return None
    for term in total.inputs:
        full = len(term.shape or ()) == 3 and term.shape[0] == shape[0] and term.shape[2] == shape[2]
        if not full or term.shape[1] == 1 or isinstance(term, gs.Constant):
            return None
    later = all(place.get(id(reader), -1) >= place[id(node)] for reader in x.outputs)
    return total if later else None


def _fuse(node: gs.Node, total: gs.Node, new: Emitter, images: Images) -> list[gs.Node]:
    """The nodes that take the place of norm and sum."""
    x, *affine = node.inputs
    terms, biases = _terms(total, new, images)
    vectors = [images.vectors(tensor, new) for tensor in affine]
    output = node.outputs[0]
    node.outputs.clear()
    total.outputs.clear()
    images.dead |= {id(node), id(total)}
    results: tuple[list[gs.Tensor], list[gs.Tensor]] = ([], [])
    for inputs in zip(*terms, *vectors, *biases, strict=True):
        pair = (output, x) if x.shape[0] == 1 else tuple(_image(new, tensor) for tensor in (output, x))
        outputs = [pair[0], gs.Variable.empty(), gs.Variable.empty(), pair[1]]
        epsilon = node.attrs.get("epsilon", 1e-5)
        new.emit_to("SkipLayerNormalization", list(inputs), outputs, epsilon=epsilon)
        new.nodes[-1].domain = MICROSOFT
        for made, tensor in zip(results, pair, strict=True):
            made.append(tensor)
    if x.shape[0] != 1:
        for made, tensor in zip(results, (output, x), strict=True):
            new.emit_to("Concat", made, [tensor], axis=0)
        images.made[id(x)] = results[1]
    return new.nodes


def _image(new: Emitter, like: gs.Tensor) -> gs.Tensor:
    name = new.names.fresh(f"{like.name}/image")
    return gs.Variable(name, dtype=like.dtype, shape=[1, *like.shape[1:]])


def _terms(
    total: gs.Node, new: Emitter, images: Images
) -> tuple[list[list[gs.Tensor]], list[list[gs.Tensor]]]:
    """The two terms of the sum image by image, and, when one has a gated bias, that as vectors instead."""
    found = next((g for g in (_gated(t, images) for t in total.inputs) if g is not None), None)
    if found is None:
        return [images.of(tensor, new) for tensor in total.inputs], []
    images.dead |= {id(found.product), id(found.total)}
    hand_over(producer(found.value), found.total, new.site, new.names, images.kept)
    gates, values = images.of(found.gate, new), images.of(found.value, new)
    products = [_shaped(new, "Mul", [g, v], found.value) for g, v in zip(gates, values, strict=True)]
    biases = [new.emit("Mul", [g, found.bias], found.bias.dtype) for g in images.vectors(found.gate, new)]
    gated = found.product.outputs[0]
    return [products if t is gated else images.of(t, new) for t in total.inputs], [biases]


def _gated(tensor: gs.Tensor, images: Images) -> Gated | None:
    """The tensor as a gated sum with a constant bias that nothing else reads."""
    product = producer(tensor)
    if product is None or product.op != "Mul" or len(tensor.outputs) != 1 or id(tensor) in images.kept:
        return None
    for gate, biased in (product.inputs, product.inputs[::-1]):
        total = producer(biased)
        if total is None or total.op != "Add" or len(biased.outputs) != 1 or id(biased) in images.kept:
            continue
        for value, bias in (total.inputs, total.inputs[::-1]):
            vector = isinstance(bias, gs.Constant) and len(bias.shape or ()) == 1
            if vector and list(gate.shape or ())[1:] == [1, bias.shape[0]] and len(value.shape or ()) == 3:
                return Gated(product, total, gate, value, bias)
    return None
