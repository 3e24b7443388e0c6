"""fuse-skip-norm: a residual sum, its gated bias and the adaptive norm behind it become one kernel of ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register, walk
from passes.graph.edit import Emitter, Names, drop_nodes, insert_before, rename_after
from passes.graph.match import output_ids, producer
from passes.targets.ort_cuda.flatten_attention import MICROSOFT
from passes.targets.ort_cuda.per_image import Images, image_of, shaped

_FILLING = 2048
"""Tokens that fill a GPU by themselves: over as many, a product of one image takes half the time of one of two."""


class Gated(NamedTuple):
    """gate * (value + bias), or gate * value + gate * bias, with a constant bias: the nodes that compute it.

    `gated`: the value has been multiplied by the gate.
    """

    nodes: tuple[gs.Node, ...]
    gate: gs.Tensor
    value: gs.Tensor
    bias: gs.Tensor
    gated: bool


@dataclass
class Terms:
    """What a residual sum adds up: tensors (batch, tokens, channels), such products, and gated biases."""

    plain: list[gs.Tensor] = field(default_factory=list)
    gated: list[Gated] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Terms of every token."""
        return len(self.plain) + sum(not item.gated for item in self.gated)


@register
@dataclass(frozen=True)
class FuseSkipNorm(Pass):
    """Write LayerNormalization(a + b, scale, shift) as com.microsoft's SkipLayerNormalization, which gives a + b, too.

    Fires on the adaptive norms that fuse-adaptive-norm leaves, where the batch is a number (see fix-size): this
    operator wants vectors for scale and shift, so each image of a batch gets one of its own, and what lies between two
    of them stays apart. Where b is gate * (value + bias), the bias goes into the operator as gate * bias; of several
    such terms, as one vector. One kernel takes the place of three that read and write every token. A second norm of
    the same sum makes that sum again: it is read in the same kernel. With enough `tokens`, the projections and the
    feed-forward between two norms work image by image as well, which saves joining and cutting.

    A sum whose other readers come before the norm stays, and so do those of several images over few tokens, where more
    kernels cost more than they save.

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
        names, images = Names(graph), Images(output_ids(graph), products=self.tokens >= _FILLING)
        changed = 0
        for part in walk(graph):
            place = {id(node): index for index, node in enumerate(part.nodes)}
            new: dict[int, list[gs.Node]] = {}
            for node in part.nodes:
                if not _is_adaptive(node):
                    continue
                again = images.sums.get(id(node.inputs[0]))
                total = None if again else residual_sum(node, place, images.kept, images.dead)
                if total is not None and total.outputs[0].shape[0] != 1 and self._is_short(total):
                    total = None
                if again is not None or total is not None:
                    new[id(node)] = _fuse(node, total, Emitter(node, names), images)
                    changed += 1
            insert_before(part, new)
        drop_nodes(graph, images.dead)
        return PassResult(changed, (f"{changed} norms",) if changed else ())

    def _is_short(self, total: gs.Node) -> bool:
        return any(self.short in (tensor.shape or ()) for tensor in (*total.inputs, *total.outputs))


def _is_adaptive(node: gs.Node) -> bool:
    """Whether the node is a norm whose scale and shift are computed for each image of a known batch."""
    return scale_by_image(node) and isinstance(node.inputs[0].shape[0], (int, np.integer))


def scale_by_image(node: gs.Node) -> bool:
    """Whether the node is a norm over channels whose scale and shift, (batch, 1, channels), are computed."""
    if node.op != "LayerNormalization" or node.attrs.get("axis", -1) not in (-1, 2) or len(node.inputs) != 3:
        return False
    x, *affine = node.inputs
    if x.shape is None or len(x.shape) != 3:
        return False
    per_image = [x.shape[0], 1, x.shape[2]]
    return len(node.outputs) == 1 and all(
        list(t.shape or ()) == per_image and not isinstance(t, gs.Constant) for t in affine
    )


def residual_sum(node: gs.Node, place: dict[int, int], kept: set[int], dead: set[int]) -> gs.Node | None:
    """The sum that a norm normalizes; None when it must stay: graph outputs `kept`, a reader in front of the norm.

    `place`: the nodes' places in the graph by `id()`; `dead`: the `id()` of sums that have been replaced.
    """
    x = node.inputs[0]
    total = producer(x)
    if total is None or total.op != "Add" or id(total) in dead or id(x) in kept:
        return None
    if not all(is_full(term, x) for term in total.inputs):
        return None
    later = all(place.get(id(reader), -1) >= place[id(node)] for reader in x.outputs)
    return total if later else None


def is_full(term: gs.Tensor, like: gs.Tensor) -> bool:
    """Whether a tensor has values of its own for every token."""
    shape = list(term.shape or [])
    if len(shape) != 3 or isinstance(term, gs.Constant):
        return False
    return bool(shape[0] == like.shape[0] and shape[2] == like.shape[2] and shape[1] != 1)


def _fuse(node: gs.Node, total: gs.Node | None, new: Emitter, images: Images) -> list[gs.Node]:
    """The nodes that take the place of a norm and, if given, of the sum, which is made by another norm else."""
    x, *affine = node.inputs
    if total is not None:
        images.sums[id(x)] = _terms(total, new, images)
        total.outputs.clear()
        images.dead.add(id(total))
    vectors = [images.vectors(tensor, new) for tensor in affine]
    output = node.outputs[0]
    node.outputs.clear()
    images.dead.add(id(node))
    wanted = [output] if total is None else [output, x]
    made: list[list[gs.Tensor]] = [[] for _ in wanted]
    for index, terms in enumerate(images.sums[id(x)]):
        left, right, *bias = terms
        scales = [rows[index] for rows in vectors]
        pair = wanted if x.shape[0] == 1 else [image_of(new, tensor) for tensor in wanted]
        outputs = [pair[0], *(gs.Variable.empty() for _ in "ab"), *pair[1:]] if total is not None else pair
        epsilon = node.attrs.get("epsilon", 1e-5)
        new.emit_to("SkipLayerNormalization", [left, right, *scales, *bias], outputs, epsilon=epsilon)
        new.nodes[-1].domain = MICROSOFT
        for results, tensor in zip(made, pair, strict=True):
            results.append(tensor)
    if x.shape[0] != 1:
        for results, tensor in zip(made, wanted, strict=True):
            new.emit_to("Concat", results, [tensor], axis=0)
            images.made[id(tensor)] = results
    return new.nodes


def _terms(total: gs.Node, new: Emitter, images: Images) -> list[list[gs.Tensor]]:
    """Image by image: the two tensors that make the sum and, when a term has a gated bias, that as a vector."""
    terms = Terms()
    for tensor in total.inputs:
        _collect(tensor, terms, new, images)
    big = _add_whole(terms, new, images)
    for item in terms.gated:
        if not item.gated:
            pairs = zip(images.of(item.value, new), images.of(item.gate, new), strict=True)
            big.append([shaped(new, "Mul", list(pair), item.value) for pair in pairs])
    while len(big) > 2:
        big[:2] = [[shaped(new, "Add", list(pair), pair[0]) for pair in zip(big[0], big[1], strict=True)]]
    biases = [_gated_bias(item, new, images) for item in terms.gated]
    while len(biases) > 1:
        pairs = zip(biases[0], biases[1], strict=True)
        biases[:2] = [[new.emit("Add", list(pair), pair[0].dtype) for pair in pairs]]
    return [list(item) for item in zip(*big, *biases, strict=True)]


def _collect(tensor: gs.Tensor, terms: Terms, new: Emitter, images: Images) -> None:
    """Take a term apart as far as nothing else reads what is between."""
    found = _gated(tensor, images)
    if found is not None:
        images.dead |= {id(node) for node in found.nodes}
        if not found.gated:
            rename_after(producer(found.value), found.nodes[1], new.site, new.names, images.kept)
            terms.gated.append(found)
            return
        terms.gated.append(found)
        tensor = found.value
    node = images.sole_producer(tensor)
    if node is not None and node.op == "Add" and all(is_full(t, tensor) for t in node.inputs):
        images.dead.add(id(node))
        for term in node.inputs:
            _collect(term, terms, new, images)
    else:
        terms.plain.append(tensor)


def _add_whole(terms: Terms, new: Emitter, images: Images) -> list[list[gs.Tensor]]:
    """The plain terms image by image; those that are not apart yet are added up first, and cut once."""
    apart = [tensor for tensor in terms.plain if images.comes_apart(tensor)]
    whole = [tensor for tensor in terms.plain if not images.comes_apart(tensor)]
    while len(whole) > 1 and terms.count > 2:
        out = new.emit("Add", whole[:2], whole[0].dtype)
        out.shape = list(whole[0].shape)
        whole[:2] = [out]
        terms.plain = [*apart, *whole]
    return [images.of(tensor, new) for tensor in (*apart, *whole)]


def _gated_bias(item: Gated, new: Emitter, images: Images) -> list[gs.Tensor]:
    return [new.emit("Mul", [row, item.bias], item.bias.dtype) for row in images.vectors(item.gate, new)]


def _gated(tensor: gs.Tensor, images: Images) -> Gated | None:
    """The tensor as a gated sum with a constant bias that nothing else reads."""
    node = images.sole_producer(tensor)
    if node is None or node.op not in ("Mul", "Add"):
        return None
    for other, biased in (node.inputs, node.inputs[::-1]):
        inner = images.sole_producer(biased)
        if inner is None or inner.op != {"Mul": "Add", "Add": "Mul"}[node.op]:
            continue
        for first, bias in (inner.inputs, inner.inputs[::-1]):
            if not isinstance(bias, gs.Constant) or len(bias.shape or ()) != 1:
                continue
            gated = node.op == "Add"  # the gate has been multiplied into value and bias
            gate, value = (first, other) if gated else (other, first)
            if list(gate.shape or ())[1:] == [1, bias.shape[0]] and len(value.shape or ()) == 3:
                return Gated((node, inner), gate, value, bias, gated)
    return None
