"""A chain of segments: disjoint, no weight in two, and run one after the other they are the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from passes.base import PassError
from passes.cache.regions import Group
from passes.cache.segments import Chain, is_part
from passes.graph.from_onnx import import_graph
from passes.graph.inference import infer_types
from passes.graph.to_onnx import export_graph
from tests.passes.cache.test_split_cache import run, stack, x_of

GROUPS = [Group.parse("output:block.1"), Group.parse("residual:block.3+block.4")]


def chain(model: ModelProto) -> Chain:
    return Chain(import_graph(infer_types(model)), GROUPS)


def segments(model: ModelProto) -> list[ModelProto]:
    """Every segment as a model of its own."""
    found = []
    for number in range(len(chain(model).segments)):
        graph = import_graph(infer_types(model))
        Chain(graph, GROUPS).leave(number)
        found.append(export_graph(graph, model))
    return found


def test_segments_in_order_have_their_groups() -> None:
    assert [segment.group for segment in chain(stack(6)).segments] == [None, 0, None, 1, None]


@pytest.mark.parametrize("blocks", [5, 6])
def test_one_after_the_other_they_are_the_graph(blocks: int) -> None:
    model = stack(blocks)
    x = x_of(3)
    values: dict[str, Any] = {"x": x}
    for part in segments(model):
        values |= run(part, values)
    assert np.array_equal(values["y"], run(model, {"x": x})["y"])


def test_no_weight_and_no_computed_node_is_in_two() -> None:
    parts = segments(stack(6))
    weights = [t.name for part in parts for t in part.graph.initializer if t.name.endswith(".w")]
    assert sorted(weights) == [f"block.{n}.w" for n in range(6)]
    nodes = [
        n.name for part in parts for n in part.graph.node if n.op_type in ("MatMul", "Relu", "Add", "Tanh")
    ]
    assert len(nodes) == len(set(nodes)) == 6 * 3 + 1


def test_what_a_step_without_the_group_needs_is_called_cached() -> None:
    made = chain(stack(6))
    names = {tensor.name for tensor in made.crossing}
    assert {item.name for item in made.kept} == {"cached_0_0", "cached_1_0"}
    assert {item.name for item in made.kept} <= names
    assert all(is_part([name]) for name in names)
    assert not is_part(["x", "y"])


def test_what_cannot_be_cut_is_told() -> None:
    made = chain(stack(6))
    with pytest.raises(PassError, match=r"there is no segment 5: the chain has 5 \(from 0\)"):
        made.leave(5)
    model = stack(6)
    body = model.graph.node[0].attribute.add(name="body", type=5)
    body.g.name = "b"
    model.graph.node[0].op_type, model.graph.node[0].domain = "Mine", "own"
    with pytest.raises(PassError, match="a graph with subgraphs cannot be cut"):
        Chain(import_graph(model), GROUPS)
