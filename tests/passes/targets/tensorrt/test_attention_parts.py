"""The pieces of Attention: what a site knows and declines, masks as one, heads there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto

from passes.graph.edit import Declined, Edit
from passes.graph.match import View
from passes.targets.tensorrt.attention_parts import (
    Site,
    from_heads,
    largest_above,
    mask_of,
    masked_scores,
    or_zero,
    repeat_heads,
    to_heads,
)
from tests.passes.graph_helpers import graph_of, made_by, run_ort
from tests.passes.graph_helpers import model as model_of

RNG = np.random.default_rng(8)


def site(inputs: str, call: str, outputs: str = "float y") -> Site:
    graph = graph_of(f"g ({inputs}) => ({outputs}) {{ {call} }}")
    return Site.of(made_by(graph, "y"), View(graph))


FOUR = "float[2,8,5,16] q, float[2,2,7,16] k, float[2,2,7,16] v"
THREE = "float16[b,5,128] q, float16[b,7,32] k, float16[b,7,32] v"
HEADS = "<q_num_heads = 8, kv_num_heads = 2>"


@pytest.mark.parametrize(
    ("inputs", "attributes", "expected"),
    [
        (FOUR, "", (4, 8, 2, 16, TensorProto.FLOAT)),
        (THREE, HEADS, (3, 8, 2, 16, TensorProto.FLOAT16)),
        ("float[2,h,5,16] q, float[2,h,7,16] k, float[2,h,7,16] v", "", (4, 1, 1, 16, TensorProto.FLOAT)),
        (
            "float[2,h,5,d] q, float[2,i,7,d] k, float[2,i,7,d] v",
            "",
            (4, None, None, None, TensorProto.FLOAT),
        ),
    ],
)
def test_heads_and_sizes(inputs: str, attributes: str, expected: tuple[Any, ...]) -> None:
    found = site(inputs, f"y = Attention{attributes}(q, k, v)")
    assert (found.rank, found.q_heads, found.kv_heads, found.head_size, found.dtype) == expected
    assert found.used == [True]


@pytest.mark.parametrize(
    ("inputs", "call", "reason"),
    [
        (
            f"{FOUR}, float[2,2,3,16] a, float[2,2,3,16] b",
            "y = Attention(q, k, v, , a, b)",
            "key-value cache",
        ),
        (f"{FOUR}, bool[5,3] m", "y = Attention(q, k, v, m)", "its mask has 3 columns, not one per key"),
        (
            "double[2,8,5,16] q, double[2,8,5,16] k, double[2,8,5,16] v",
            "y = Attention(q, k, v)",
            "not a supported float",
        ),
    ],
)
def test_sites_that_no_pieces_stand_for(inputs: str, call: str, reason: str) -> None:
    with pytest.raises(Declined, match=reason):
        site(inputs, call)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ("float[2,h,5,16] q, float[2,i,7,16] k, float[2,i,7,16] v", "its head counts are not known"),
        ("float[2,8,5,16] q, float[2,3,7,16] k, float[2,3,7,16] v", "the heads do not divide"),
        ("float[2,8,5,16] q, float[2,2,7,d] k, float[2,2,7,16] v", "the head size of 'k' is not known"),
    ],
)
def test_heads_that_cannot_be_repeated(inputs: str, reason: str) -> None:
    with pytest.raises(Declined, match=reason):
        site(inputs, "y = Attention(q, k, v)").check_heads()


def test_heads_that_are_equal_need_no_sizes() -> None:
    site("float[2,8,5,16] q, float[2,8,7,d] k, float[2,8,7,d] v", "y = Attention(q, k, v)").check_heads()


def pieces(inputs: str, call: str) -> tuple[gs.Graph, Edit, Site]:
    graph = graph_of(f"g ({inputs}) => (float y) {{ {call} }}")
    edit = Edit(graph)
    return graph, edit, Site.of(made_by(graph, "y"), edit.view)


def computed(graph: gs.Graph, edit: Edit, site: Site, result: gs.Tensor, feeds: dict[str, Any]) -> Any:
    """The values of `result`, in the place of the node's output."""
    edit.at(site.node).emit_to("Identity", [result], edit.release(site.node))
    edit.apply()
    from passes.graph.to_onnx import export_graph

    like = model_of("g (float x) => (float y) { y = Neg(x) }")
    made = export_graph(graph, like)
    made.graph.output[0].type.tensor_type.ClearField("shape")
    (value,) = run_ort(made, feeds)
    return value


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_to_heads_repeated_and_back(count: int) -> None:
    """numpy's repeat of each head, in the order h0 h0 h1 h1."""
    inputs = f"float[2,5,32] q, float[2,7,{4 * count}] k, float[2,7,{4 * count}] v"
    graph, edit, found = pieces(inputs, f"y = Attention<q_num_heads = 8, kv_num_heads = {count}>(q, k, v)")
    new, k = edit.at(found.node), graph.inputs[1]
    heads = repeat_heads(new, to_heads(new, k, count, found), k, found)
    back = gs.Variable("back", np.float32)
    from_heads(new, heads, back, found)
    x = RNG.standard_normal((2, 7, 4 * count)).astype(np.float32)
    want = np.repeat(x.reshape(2, 7, count, 4), 8 // count, axis=2).reshape(2, 7, 32)
    feeds = {"q": np.zeros((2, 5, 32), np.float32), "k": x, "v": x}
    assert np.array_equal(computed(graph, edit, found, back, feeds), want)


@pytest.mark.parametrize("kind", ["", "float", "bool"])
@pytest.mark.parametrize("causal", [False, True])
def test_masks(kind: str, causal: bool) -> None:
    """Scores with their mask, and zeros for what is masked whole, against numpy."""
    mask_input = f", {kind}[5,7] m" if kind else ""
    inputs = f"float[2,3,5,4] q, float[2,3,7,4] k, float[2,3,7,4] v{mask_input}"
    call = f"y = Attention<is_causal = {int(causal)}>(q, k, v{', m' if kind else ''})"
    graph, edit, found = pieces(inputs, call)
    new, scores = edit.at(found.node), graph.inputs[0]  # any (2, 3, 5, 4) stands for scores of four keys
    scores = new.emit(
        "MatMul",
        [scores, new.emit("Transpose", [graph.inputs[1]], np.float32, perm=[0, 1, 3, 2])],
        np.float32,
    )
    mask = mask_of(new, found)
    assert (mask is None) == (not kind and not causal)
    q, k = (RNG.standard_normal((2, 3, n, 4)).astype(np.float32) for n in (5, 7))
    given: Any = (
        RNG.standard_normal((5, 7)).astype(np.float32) if kind == "float" else RNG.random((5, 7)) > 0.5
    )
    given[2] = -np.inf if kind == "float" else False  # a query that sees nothing
    want = q @ k.transpose(0, 1, 3, 2)
    seen = np.tril(np.ones((5, 7), bool)) if causal else np.ones((5, 7), bool)
    if kind == "float":
        want = want + np.where(seen, given, -np.inf)
    else:
        want = np.where(seen & given if kind == "bool" else seen, want, -np.inf)
    result = scores
    if mask is not None:
        assert mask.given == bool(kind)
        result = masked_scores(new, scores, mask, found)
        open_rows = largest_above(new, result, mask.least, found)
        result = or_zero(new, open_rows, result, found)
        want = np.where(np.isfinite(want).any(-1, keepdims=True), want, 0)
    feeds = {"q": q, "k": k, "v": k} | ({"m": given} if kind else {})
    got = computed(graph, edit, found, result, feeds)
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    assert np.allclose(got[np.isfinite(want)], want[np.isfinite(want)], rtol=1e-5, atol=1e-5)
