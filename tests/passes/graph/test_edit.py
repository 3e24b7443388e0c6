"""Edit: what it collects is ordered and applied at once, in subgraphs too; names; reasons."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from passes.base import Refusal
from passes.graph.edit import Declined, Edit, Names, replace_output
from passes.graph.match import View, is_op
from tests.passes.graph_helpers import graph_of, made_by

CHAIN = "g (float[4] x) => (float[4] y) { a = Neg(x) b = Abs(a) c = Relu(b) y = Neg(c) }"


@pytest.mark.parametrize("seed", range(30))
def test_places(seed: int) -> None:
    """Random insertions before and after nodes, and random removals, against a list that is changed at once."""
    rng = np.random.default_rng(seed)
    graph = graph_of(
        f"g (float[4] t0) => (float[4] t9) {{ {' '.join(f't{i + 1} = Neg(t{i})' for i in range(9))} }}"
    )
    nodes, edit = list(graph.nodes), Edit(graph)
    before: dict[int, list[str]] = {i: [] for i in range(9)}
    after: dict[int, list[str]] = {i: [] for i in range(9)}
    for step in range(12):
        place, named, behind = int(rng.integers(9)), int(rng.integers(9)), bool(rng.integers(2))
        new = edit.at(nodes[place], named=nodes[named], after=behind)
        new.emit("Abs", [graph.inputs[0]])
        (after if behind else before)[place].append(new.nodes[-1].name)
        assert new.nodes[-1].name.startswith(nodes[named].name), step
    gone = {int(i) for i in rng.integers(9, size=2)}
    edit.remove(*(nodes[i] for i in gone))
    assert list(graph.nodes) == nodes  # nothing happens before it is applied
    edit.apply()
    wanted = [n for i in range(9) for n in (*before[i], *([] if i in gone else [nodes[i].name]), *after[i])]
    assert [node.name for node in graph.nodes] == wanted
    assert len(set(wanted)) == len(wanted)
    assert all(not nodes[i].inputs and not nodes[i].outputs for i in gone)


def test_a_new_node_takes_the_outputs_of_one_that_goes() -> None:
    graph = graph_of(CHAIN)
    edit, node = Edit(graph), made_by(graph, "b")
    (x,), users = node.inputs, list(node.outputs[0].outputs)
    new = edit.at(node)
    twice = new.emit("Add", [x, x], np.float32, [4])
    new.emit_to("Gelu", [twice], edit.release(node), domain="com.microsoft", flag=3)
    edit.apply()
    made = made_by(graph, "b")
    assert (made.op, made.domain, made.attrs, made.outputs[0].outputs) == (
        "Gelu",
        "com.microsoft",
        {"flag": 3},
        users,
    )
    assert [n.op for n in graph.nodes] == ["Neg", "Add", "Gelu", "Relu", "Neg"]
    assert (twice.dtype, twice.shape, twice.name) == (np.float32, [4], f"{node.name}/Add_out")


def test_inputs_and_uses() -> None:
    graph = graph_of("g (float[4] x, float[4] z) => (float[4] y, float[4] w) { y = Add(x, x) w = Mul(x, z) }")
    edit, (x, z) = Edit(graph), graph.inputs
    edit.replace_input(made_by(graph, "y"), x, z)
    assert [t.name for t in made_by(graph, "y").inputs] == ["z", "x"]
    edit.replace_uses(x, z)
    assert [t.name for n in graph.nodes for t in n.inputs] == ["z"] * 4
    assert len(x.outputs) == 0


@pytest.mark.parametrize(
    ("names", "outputs", "renamed"),
    [
        (("m/MatMul", "m/Add", "act/Gelu"), "y", "act/MatMul_out"),
        (("m/MatMul", "m2/Add", "act/Gelu"), "y", "p"),  # the sum belongs to another module than the product
        (("MatMul", "Add", "act/Gelu"), "y", "p"),  # no module
        (("m/MatMul", "m/Add", "act/Gelu"), "y p", "p"),  # an output keeps its name
    ],
)
def test_a_value_without_its_bias_is_called_after_what_took_it(
    names: tuple[str, ...], outputs: str, renamed: str
) -> None:
    given = ", ".join(f"float[b,4] {name}" for name in outputs.split())
    graph = graph_of(
        f"g (float[b,3] x) => ({given}) {{ p = MatMul(x, w) s = Add(p, b) y = Gelu(s) }}",
        {"w": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)},
    )
    for node, name in zip(graph.nodes, names, strict=True):
        node.name = name
    edit, (product, total, gelu) = Edit(graph), graph.nodes
    edit.rename_after(product.outputs[0], total, gelu)
    assert product.outputs[0].name == renamed
    edit.rename_after(graph.inputs[0], total, gelu)
    assert graph.inputs[0].name == "x"


BODIES = """g (float[4] x, bool c) => (float[4] y) {
    a = Neg(x)
    b = If (c) <then_branch = t () => (float[4] p) { p = Neg(a) }, else_branch = e () => (float[4] q) { q = Abs(a) }>
    y = Neg(b)
}"""


def test_each_match_is_rewritten_in_bodies_too() -> None:
    graph, seen = graph_of(BODIES), list[int]()

    def match(node: gs.Node, _view: View) -> gs.Node | str | None:
        if is_op(node, "Abs"):
            return "it is an Abs"
        return node if is_op(node, "Neg") else None

    def rewrite(node: gs.Node, edit: Edit) -> None:
        seen.append(len(edit.made))
        edit.made[id(node)] = node.outputs[0]
        edit.at(node).emit_to("Relu", list(node.inputs), edit.release(node))

    result = Edit(graph).rewrite_each(match, rewrite, "things")
    assert (result.changed, result.notes) == (3, ("3 things",))
    assert [refusal.reason for refusal in result.refusals] == ["it is an Abs"]
    assert seen == [0, 1, 0]  # what was made in the graph is not for its bodies, where it may not be in reach
    branch = made_by(graph, "b")
    assert [n.op for n in graph.nodes] == ["Relu", "If", "Relu"]
    assert [n.op for n in branch.attrs["then_branch"].nodes] == ["Relu"]


def test_a_match_declines_from_deep_below() -> None:
    graph = graph_of(CHAIN)

    def match(node: gs.Node, _view: View) -> gs.Node | None:
        if is_op(node, "Abs"):
            raise Declined("it is an Abs")
        return node if is_op(node, "Relu") else None

    result = Edit(graph).rewrite_each(
        match, lambda node, edit: edit.decline(node.outputs[0], "half done"), "things"
    )
    assert result.refusals == (Refusal(made_by(graph, "b").name, "it is an Abs"), Refusal("c", "half done"))
    assert result.notes == ("1 things",)


def test_what_is_removed_reads_nothing_and_is_removed_once() -> None:
    graph = graph_of("g (float[4] x) => (float[4] y, float[4] z) { y = Neg(x) z = Abs(x) u = Relu(x) }")
    edit, x = Edit(graph), graph.inputs[0]
    edit.remove(made_by(graph, "u"))
    edit.at(made_by(graph, "y")).emit("Sign", [x])
    assert [node.op for node in edit.readers(x)] == ["Neg", "Abs", "Sign"]
    result = edit.finish({"signs": 1, "sines": 0, "nodes gone": 1})
    assert (result.changed, result.notes, result.refusals) == (2, ("1 signs", "1 nodes gone"), ())
    ops = [node.op for node in graph.nodes]
    assert ops == ["Sign", "Neg", "Abs"]
    edit.apply()  # what was applied is not applied again
    assert [node.op for node in graph.nodes] == ops


def test_another_output() -> None:
    graph = graph_of("g (float[4] x) => (float[2] y, float[2] z) { y, z = Split<num_outputs = 2>(x) }")
    node, z = made_by(graph, "y"), graph.outputs[1]
    replace_output(node, z, gs.Variable("w"))
    assert [tensor.name for tensor in node.outputs] == ["y", "w"]
    assert len(z.inputs) == 0


def test_groups() -> None:
    graph = graph_of(CHAIN)

    def match(node: gs.Node, _view: View) -> gs.Node | str | None:
        return "it is a Relu" if is_op(node, "Relu") else node

    def rewrite(group: list[gs.Node], edit: Edit) -> None:
        for node in group:
            edit.at(node).emit_to("Sign", list(node.inputs), edit.release(node))

    relu = made_by(graph, "c").name
    result = Edit(graph).rewrite_groups(match, lambda found: [found[:1], found[2:]], rewrite, "nodes")
    assert (result.changed, result.notes, result.refusals) == (
        2,
        ("2 nodes",),
        (Refusal(relu, "it is a Relu"),),
    )
    assert [node.op for node in graph.nodes] == ["Sign", "Abs", "Relu", "Sign"]
    nothing = Edit(graph).rewrite_groups(match, lambda found: [], rewrite, "nodes")
    assert (nothing.changed, nothing.notes) == (0, ())


def test_names_are_fresh_in_bodies_too() -> None:
    names = Names(graph_of(BODIES))
    assert [names.fresh(wish) for wish in ("a", "q", "new", "new", "a")] == [
        "a_2",
        "q_2",
        "new",
        "new_2",
        "a_3",
    ]
