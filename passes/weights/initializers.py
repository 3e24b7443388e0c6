"""The initializers of a model: which there are, and putting the values of a recipe into one."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto

from passes.weights.evaluate import evaluate, to_bytes
from passes.weights.recipe import Recipe

INLINE_BYTES = 1024
"""Tensors up to this size stay inside the .onnx file: parsers and shape inference read their values."""


def initializers(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every initializer of the main graph and its subgraphs."""
    yield from _graph_initializers(model.graph)


def _graph_initializers(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graph_initializers(attribute.g)
            for sub in attribute.graphs:
                yield from _graph_initializers(sub)


def inline(name: str, recipe: Recipe) -> TensorProto:
    """The recipe's result as an initializer that holds its values itself."""
    data = bytes(to_bytes(evaluate(recipe)))
    return TensorProto(name=name, data_type=recipe.dtype, dims=recipe.shape, raw_data=data)
