"""Which nodes belong to a group of cached blocks, and which tensors leave it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from passes.base import PassError
from passes.cache.regions import Group, Regions, is_bookkeeping
from tests.passes.graph_helpers import graph_of, made_by

TEXT = """g (float[b,4] x) => (float[b,4] y) {
    h = Mul(x, x)
    size = Shape(h)
    a = MatMul(h, w)
    r = Reshape(a, size)
    h0 = Add(h, r)
    h1 = Relu(h0)
    y = Tanh(h1)
}"""
NAMES = (
    "embed/Mul",
    "block.0/Shape",
    "block.0.lin/MatMul",
    "block.0/Reshape",
    "block.0/Add",
    "block.1/Relu",
    "head/Tanh",
)


def graph() -> gs.Graph:
    made = graph_of(TEXT, {"w": np.ones((4, 4), np.float32)})
    for node, name in zip(made.nodes, NAMES, strict=True):
        node.name = name
    return made


@pytest.mark.parametrize("text", ["output:block.0", "residual:a.b+c.d.1"])
def test_a_group_is_what_its_text_says(text: str) -> None:
    group = Group.parse(text)
    assert str(group) == text
    assert group.residual == text.startswith("residual")
    assert group.blocks == tuple(text.partition(":")[2].split("+"))


@pytest.mark.parametrize("text", ["", "block.0", "keep:block.0", "output:", ":block.0"])
def test_other_texts_are_no_group(text: str) -> None:
    with pytest.raises(PassError, match="Expected: output:path"):
        Group.parse(text)


def test_nodes_belong_to_the_block_that_begins_their_name() -> None:
    made = graph()
    regions = Regions(made, [Group.parse("output:block.0"), Group.parse("output:block.1")])
    found = {node.name: regions.group_of(node) for node in made.nodes}
    assert found == {
        "embed/Mul": None,
        "block.0/Shape": None,  # arithmetic on sizes belongs to no group
        "block.0.lin/MatMul": 0,
        "block.0/Reshape": 0,
        "block.0/Add": 0,
        "block.1/Relu": 1,
        "head/Tanh": None,
    }


@pytest.mark.parametrize("blocks", ["block", "block.00", "block.0.l", "heads"])
def test_a_part_of_a_name_is_no_path(blocks: str) -> None:
    if blocks == "block":
        assert Regions(graph(), [Group.parse(f"output:{blocks}")])  # holds both blocks
        return
    with pytest.raises(PassError, match=f"no node belongs to output:{blocks}"):
        Regions(graph(), [Group.parse(f"output:{blocks}")])


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (["output:block.0"], [("cached_0_0", "h0", None)]),
        (["residual:block.0"], [("cached_0_0", "h0", "h")]),
        (["output:block.0", "output:block.1"], [("cached_0_0", "h0", None), ("cached_1_0", "h1", None)]),
        (["output:block.0+block.1"], [("cached_0_0", "h1", None)]),
        (["output:head"], [("cached_0_0", "y", None)]),  # an output of the graph leaves every group
    ],
)
def test_tensors_that_leave_a_group(groups: list[str], expected: list[tuple[str, str, str | None]]) -> None:
    kept = Regions(graph(), [Group.parse(text) for text in groups]).kept()
    assert [
        (k.name, k.tensor.name, k.source.name if k.source is not None else None) for k in kept
    ] == expected


def test_a_residual_must_be_a_sum() -> None:
    with pytest.raises(PassError, match="is not the sum of an input of its blocks"):
        Regions(graph(), [Group.parse("residual:block.1")]).kept()


def test_bookkeeping_knows_sizes_of_what_always_runs() -> None:
    made = graph()
    shape, add = made_by(made, "size"), made_by(made, "h0")
    embed = {id(made_by(made, "h"))}
    assert is_bookkeeping(shape, set(), embed)
    assert not is_bookkeeping(shape, set(), set())
    assert not is_bookkeeping(add, set(), embed)
