"""The images of a batch as tensors of their own, for what ONNX Runtime computes faster so (see fuse-skip-norm)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.graph.edit import Edit, Emitter
from passes.graph.match import cut_of, dims, either, is_op, sole_producer

_BY_VALUE = ("Add", "Mul", "Gelu", "FastGelu")
"""What gives each value from those at the same place, or from a constant that all images share."""


@dataclass
class Images:
    """Tensors taken apart, each once, while a graph is edited.

    With `products`, matrix products and what lies before them is done image by image, too, where that needs no copy
    that it saves elsewhere.
    """

    edit: Edit
    products: bool = False
    made: dict[int, list[gs.Tensor]] = field(default_factory=dict)
    """By the `id()` of a tensor: its images."""
    rows: dict[int, list[gs.Tensor]] = field(default_factory=dict)
    """By the `id()` of a tensor (batch, 1, channels): its images as vectors."""

    def of(self, tensor: gs.Tensor, new: Emitter) -> list[gs.Tensor]:
        """A tensor (batch, tokens, channels) image by image; what it alone needs is taken apart with it."""
        if tensor.shape[0] == 1:
            return [tensor]
        if id(tensor) not in self.made:
            self.made[id(tensor)] = self._made(tensor, new)
        return self.made[id(tensor)]

    def vectors(self, tensor: gs.Tensor, new: Emitter) -> list[gs.Tensor]:
        """A tensor (batch, 1, channels) as a vector for each image."""
        if id(tensor) not in self.rows:
            self.rows[id(tensor)] = [new.reshape(row, [-1]) for row in self.of(tensor, new)]
        return self.rows[id(tensor)]

    def comes_apart(self, tensor: gs.Tensor) -> bool:
        """Whether the images of a tensor are there, or are computed one by one."""
        node = self._maker(tensor)
        return id(tensor) in self.made or (node is not None and self._comes_apart(node))

    def _maker(self, tensor: gs.Tensor) -> gs.Node | None:
        """The node that makes a tensor, when it may be replaced by one for each image."""
        return sole_producer(tensor, self.edit.view)

    def _made(self, tensor: gs.Tensor, new: Emitter) -> list[gs.Tensor]:
        """The images of a tensor, by a node for each in place of its own; cut from it where that must stay."""
        node = self._maker(tensor)
        if node is None or not self._comes_apart(node):
            return _cut(tensor, new)
        self.edit.remove(node)
        if node.op == "Slice":
            return _cut_tokens(node, new)
        inputs = [self._shares(t, int(tensor.shape[0]), new) for t in _in_order(node)]
        return [
            shaped(new, node.op, list(items), tensor, domain=node.domain, **node.attrs)
            for items in zip(*inputs, strict=True)
        ]

    def _shares(self, tensor: gs.Tensor, batch: int, new: Emitter) -> list[gs.Tensor]:
        """What each image needs of an input."""
        if not _varies(tensor):
            return [tensor] * batch
        node = self._maker(tensor)
        for weight, gate in either(node) if is_op(node, "Mul") else ():
            # A constant [K, N] times a computed (batch, 1, N), as fold-gates leaves it. By a vector: ONNX Runtime's
            # kernel for rows is three times as fast as the one for any broadcast.
            if (
                isinstance(weight, gs.Constant)
                and len(weight.shape) == 2
                and _varies(gate)
                and gate.shape[1] == 1
            ):
                self.edit.remove(node)
                return [new.emit("Mul", [weight, row], tensor.dtype) for row in self.vectors(gate, new)]
        return self.of(tensor, new)

    def _comes_apart(self, node: gs.Node) -> bool:
        """Whether a node may work image by image."""
        if node.op == "Slice":
            return self.products and _varies(node.inputs[0]) and _cuts_tokens(node)
        if len(node.outputs) != 1 or not all(_varies(t) or _is_shared(t) for t in node.inputs):
            return False
        if node.op in _BY_VALUE:
            varying = [t for t in node.inputs if _varies(t)]
            # A sum of few values with a constant is better done for all images.
            many = self.products and node.outputs[0].shape[1] != 1
            return len(varying) == len(node.inputs) or (many and len(varying) > 0)
        x = node.inputs[0]
        if node.op != "MatMul" or not self.products or not _varies(x):
            return False
        return self._is_free(x) or bool(x.shape[2] <= node.outputs[0].shape[2])

    def _is_free(self, tensor: gs.Tensor) -> bool:
        """Whether the images of a tensor are there, or are made without cutting one that is whole."""
        node = self._maker(tensor)
        if node is None or id(tensor) in self.made or not self._comes_apart(node):
            return id(tensor) in self.made
        return node.op == "Slice" or all(self._is_free(t) for t in node.inputs if _varies(t))


def shaped(new: Emitter, op: str, inputs: list[gs.Tensor], like: gs.Tensor, **attrs: Any) -> gs.Tensor:
    """An operator on one image of `like`."""
    return new.emit(op, inputs, like.dtype, [1, *like.shape[1:]], **attrs)


def image_of(new: Emitter, like: gs.Tensor) -> gs.Tensor:
    """A new tensor for one image of `like`."""
    name = new.names.fresh(f"{like.name}/image")
    return gs.Variable(name, dtype=like.dtype, shape=[1, *like.shape[1:]])


def _in_order(node: gs.Node) -> list[gs.Tensor]:
    """The inputs; of a product or sum, what all tokens share last: ONNX Runtime has a faster kernel for that."""
    if node.op not in ("Add", "Mul"):
        return list(node.inputs)
    return sorted(node.inputs, key=lambda tensor: len(tensor.shape) < 3 or tensor.shape[1] == 1)


def _varies(tensor: gs.Tensor) -> bool:
    """Whether a tensor has a part of its own for each of several images, a known number."""
    if isinstance(tensor, gs.Constant) or len(dims(tensor)) != 3:
        return False
    return isinstance(tensor.shape[0], (int, np.integer)) and bool(tensor.shape[0] != 1)


def _is_shared(tensor: gs.Tensor) -> bool:
    """Whether all images use the same values of it."""
    return isinstance(tensor, gs.Constant) and (len(tensor.shape) < 3 or tensor.shape[0] == 1)


def _cut(tensor: gs.Tensor, new: Emitter) -> list[gs.Tensor]:
    """The images of a tensor that is computed for all at once."""
    parts = [image_of(new, tensor) for _ in range(tensor.shape[0])]
    if tensor.shape[1] == 1:  # small: one kernel that writes all parts
        new.emit_to("Split", [tensor], parts, axis=0, num_outputs=len(parts))
        return parts
    bounds = [new.ints(f"image_{i}", i) for i in range(len(parts) + 1)]
    for part, (start, end) in zip(parts, pairwise(bounds), strict=True):  # each a copy of one piece of memory
        new.emit_to("Slice", [tensor, start, end, bounds[0]], [part])
    return parts


def _cuts_tokens(node: gs.Node) -> bool:
    """Whether a Slice takes some tokens, one after another, of every image."""
    cut = cut_of(node)
    return cut is not None and cut.axis == 1


def _cut_tokens(node: gs.Node, new: Emitter) -> list[gs.Tensor]:
    """The images of what such a Slice gives, each by a Slice of its own."""
    x, start, end = node.inputs[:3]
    axes = new.ints("axes", 0, 1)
    parts = [image_of(new, node.outputs[0]) for _ in range(x.shape[0])]
    for i, part in enumerate(parts):
        first, last = (new.ints(f"image_{j}", j) for j in (i, i + 1))
        bounds = [new.emit("Concat", pair, np.int64, axis=0) for pair in ((first, start), (last, end))]
        new.emit_to("Slice", [x, *bounds, axes], [part])
    return parts
