"""What a graph costs at given sizes: the shapes of its tensors, and its floating-point operations.

ONNX infers few shapes downstream of dynamic dimensions. Here dimensions get numbers, and what a graph computes from
them is folded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

import onnx

from diffc.errors import DiffcError
from diffc.models.sizes import Dims, size_of
from passes import Pipeline
from passes.canonical.fold_constants import FoldConstants
from passes.graph.inference import infer_types

Shapes = Mapping[str, tuple[int, ...]]


def count_operations(model: onnx.ModelProto, sizes: Mapping[str, int], kept: Dims) -> Counter[str]:
    """Multiplications and additions of the matrix products in a canonical `model`, by kind of node.

    `sizes` are those of the dynamic dimensions, `kept` the dims of the kept tensors among the inputs. MatMul, Gemm,
    Conv and Attention count, with two operations for each product of two numbers, as in torch's FlopCounterMode. Raises
    DiffcError where a shape is not known.
    """
    folded = at_sizes(model, sizes, kept)
    shapes = known_shapes(folded)
    found: Counter[str] = Counter()
    for node in folded.graph.node:
        if node.op_type in _COUNT:
            try:
                found[node.op_type] += _COUNT[node.op_type](node, shapes)
            except KeyError as error:
                raise DiffcError(
                    f"the shape of {error} at {node.name!r} is not known", fix="take another --cache-layout"
                ) from error
    return found


def at_sizes(model: onnx.ModelProto, sizes: Mapping[str, int], kept: Dims) -> onnx.ModelProto:
    """A copy of `model` at `sizes`: dimensions are numbers, what follows from them is folded, types are inferred."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                dim.dim_value = size_of(
                    kept[value.name][axis] if value.name in kept else dim.dim_param, sizes
                )
    for value in fixed.graph.output:  # ONNX fills in what is not there
        value.type.tensor_type.ClearField("shape")
    del fixed.graph.value_info[:]
    for node in fixed.graph.node:
        if (
            node.op_type == "GroupNormalization"
        ):  # ONNX infers no shape for it; the output has that of the input
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    return infer_types(Pipeline([FoldConstants()]).run(fixed).model)


def known_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes that a model states in full, by tensor name."""
    graph = model.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _matmul(node: onnx.NodeProto, shapes: Shapes) -> int:
    return 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: onnx.NodeProto, shapes: Shapes) -> int:
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]


def _conv(node: onnx.NodeProto, shapes: Shapes) -> int:
    return 2 * prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])


def _attention(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Queries with keys, then probabilities with values; all tensors [batch, heads, tokens, width]."""
    q, k, v = (shapes[name] for name in node.input[:3])
    return 2 * prod(q[:3]) * k[2] * (q[3] + v[3])


_COUNT = {"MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "Attention": _attention}
