"""merge-projections: which products of a short sequence become one."""

from typing import Any

import onnx
import pytest

from passes.targets.ort_cuda.merge_projections import MergeProjections
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, check_same, error, model, ops, refused, run_ort
from tests.passes.targets.ort_cuda.graphs import seeded

random = seeded(22)


def network(tokens: str = "text", also: str = "", third: str = "x", width: int = 6) -> onnx.ModelProto:
    """Queries, keys and values, the last of which may have another input or width."""
    extra = ", float[b,u,6] z" if also else ""
    made = model(
        f"""g (float[b,{tokens},4] x, float[b,{tokens},4] c) => (float[b,{tokens},6] q, float[b,{tokens},6] k,
        float[b,{tokens},{width}] v{extra}) {{
        pq = MatMul(x, wq) q = Add(pq, bq)
        pk = MatMul(x, wk) k = Add(bk, pk)
        pv = MatMul({third}, wv) v = Add(pv, bv)
        {also} }}""",
        {
            **{f"w{n}": Recipe.of_array(random(6, 4)).transpose((1, 0)) for n in "qk"},
            **{f"b{n}": random(6) for n in "qk"},
            "wv": Recipe.of_array(random(width, 4)).transpose((1, 0)),
            "bv": random(width),
        },
    )
    return onnx.shape_inference.infer_shapes(made, data_prop=True)


def feeds() -> dict[str, Any]:
    return {"x": random(2, 5, 4), "c": random(2, 5, 4)}


@pytest.mark.parametrize(("options", "left"), [({}, 1), ({"third": "c"}, 2), ({"width": 8}, 2)])
def test_products_of_one_input_and_width_become_one(options: dict[str, Any], left: int) -> None:
    before = network(**options)
    result = apply(before, MergeProjections())
    assert ops(result.model).count("MatMul") == ops(result.model).count("Add") == left
    assert ops(result.model).count("Split") == 1
    values = feeds()
    check_same(before, result.model, values, 1e-6, run_ort)
    want = run_ort(before, values)
    assert all(
        error(want[i], want[j]) > 0.1 for i, j in ((0, 1), (1, 2), (0, 2))
    )  # none stands in for another
    assert apply(result.model, MergeProjections()).changed == 0


def test_must_not_fire() -> None:
    assert refused(network(tokens="image"), MergeProjections()) == set()
    assert apply(network(tokens="image"), MergeProjections(short="image")).changed == 3
    before = network(also="z = Neg(pk)")
    shared = apply(before, MergeProjections())
    assert ops(shared.model).count("MatMul") == 2  # keys are read without their bias
    check_same(before, shared.model, feeds(), 1e-6, run_ort)
    reason = "its bias is not a constant [channels], or something else reads the product without it"
    assert {refusal.reason for refusal in shared.records[0].refusals} == {reason}


def test_a_bias_of_one_element_is_refused() -> None:
    before = network()
    for tensor in before.graph.initializer:
        if tensor.name.startswith("b"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(random(1), tensor.name))
    reason = "its bias is not a constant [channels], or something else reads the product without it"
    assert refused(before, MergeProjections()) == {reason}
