"""Residual sums and the norms that read them: what fuse-skip-norm, fuse-shared-norm and fuse-residual ask in common."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from passes.graph.match import View, dims, is_channel_norm, is_op, is_per_image, producer


def is_adaptive_norm(node: gs.Node) -> bool:
    """Whether a node is a norm over channels whose scale and shift, (batch, 1, channels), are computed."""
    if not is_channel_norm(node) or len(node.inputs) != 3:
        return False
    x, *affine = node.inputs
    return all(is_per_image(tensor, x) and not isinstance(tensor, gs.Constant) for tensor in affine)


def is_full(term: gs.Tensor, like: gs.Tensor) -> bool:
    """Whether a tensor is computed and has values of its own for every token of `like` (batch, tokens, channels)."""
    shape = dims(term)
    if len(shape) != 3 or isinstance(term, gs.Constant):
        return False
    return bool(shape[0] == like.shape[0] and shape[2] == like.shape[2] and shape[1] != 1)


def residual_sum(norm: gs.Node, view: View) -> gs.Node | str:
    """The sum that a norm normalizes, which can be computed where the norm is; the reason when it cannot."""
    x = norm.inputs[0]
    total = producer(x)
    if not is_op(total, "Add") or not all(is_full(term, x) for term in total.inputs):
        return "its input is not a sum of two tensors (batch, tokens, channels)"
    if id(x) in view.outputs:
        return "the sum before it is an output"
    if not all(view.is_later(reader, norm) for reader in x.outputs):
        return "the sum before it is read before the norm"
    return total
