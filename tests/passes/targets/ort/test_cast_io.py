import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from passes import PassError, Pipeline
from passes.targets.ort.cast_io import CastIo
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import apply, error, model, ops, run_ort, run_reference

RNG = np.random.default_rng(11)
IDS = RNG.integers(0, 128, (5, 3))
TEXT = """g (float[n,3] ids, float16[n,4] x, float16[4] unread) => (float16[n,3] y, float[n,3] z) {
    z = Sin(ids)
    c = Cast<to = 10>(z)
    m = MatMul(x, w)
    y = Mul(m, c)
}"""
WEIGHT = Recipe.of_array(RNG.standard_normal((4, 3)).astype(np.float16))


def types(made: onnx.ModelProto) -> dict[str, int]:
    values = [*made.graph.input, *made.graph.output]
    return {v.name: v.type.tensor_type.elem_type for v in values}


def feeds() -> dict[str, np.ndarray]:
    x = RNG.standard_normal((5, 4)).astype(np.float16)
    return {"ids": IDS.astype(np.float32), "x": x, "unread": np.ones(4, np.float16)}


def test_inputs_and_outputs_get_their_types_and_the_same_numbers_come_out() -> None:
    before = model(TEXT, {"w": WEIGHT})
    after = apply(before, CastIo(("ids:int64", "y:float32", "unread:float32"))).model
    assert types(after) == {
        "ids": TensorProto.INT64,
        "x": TensorProto.FLOAT16,
        "unread": TensorProto.FLOAT,
        "y": TensorProto.FLOAT,
        "z": TensorProto.FLOAT,
    }
    fed = feeds()
    want_y, want_z = run_reference(before, fed)
    got_y, got_z = run_reference(after, fed | {"ids": IDS, "unread": np.ones(4, np.float32)})
    assert np.abs(want_y).max() > 0
    assert ops(after).count("Cast") == 3  # the graph's own, and none behind the input that nothing reads
    assert np.array_equal(got_y, want_y.astype(np.float32))
    assert np.array_equal(got_z, want_z)


def test_an_output_that_nodes_read_too_is_cast_behind_them() -> None:
    after = apply(model(TEXT, {"w": WEIGHT}), CastIo(("z:float16",))).model
    assert ops(after).count("Cast") == 2
    fed = feeds()
    want = run_ort(model(TEXT, {"w": WEIGHT}), fed)
    got = run_ort(after, fed)
    assert np.array_equal(got[0], want[0])  # y reads z in float32, as before
    assert got[1].dtype == np.float16
    assert 0 < error(got[1].astype(np.float32), want[1]) < CastIo.tolerance


def test_bfloat16_at_the_border_becomes_float32_exactly() -> None:
    before = model("g (bfloat16[n,4] x) => (bfloat16[n,4] y) { y = Mul(x, x) }")
    after = apply(before, CastIo(("x:float32", "y:float32"))).model
    x = RNG.standard_normal((3, 4)).astype(ml_dtypes.bfloat16)
    (want,), (got,) = run_reference(before, {"x": x}), run_reference(after, {"x": x.astype(np.float32)})
    assert got.dtype == np.float32
    assert np.array_equal(got, want.astype(np.float32))


def test_weights_outside_of_the_file_stay_where_they_are() -> None:
    before = model(TEXT)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=[4, 3], data_location=1)
    weight.external_data.add(key="location", value="model.onnx_data")
    before.graph.initializer.append(weight)
    after = Pipeline([CastIo(("ids:int64",))]).run(before).model
    assert list(after.graph.initializer) == [weight]


def test_a_value_that_is_input_and_output_is_refused() -> None:
    before = model("g (float[n] x, float[n] y) => (float[n] x, float[n] z) { z = Add(x, y) }")
    result = Pipeline([CastIo(("x:float16",))]).run(before)
    assert result.changed == 0
    assert [r.node for r in result.records[0].refusals] == ["x"]


@pytest.mark.parametrize(
    ("value", "message"),
    [("nosuch:int64", "Known: ids, unread, x, y, z"), ("ids:int8", "not written as name:type")],
)
def test_unknown_names_and_types_are_errors(value: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline([CastIo((value,))]).run(model(TEXT, {"w": WEIGHT}))


def test_the_command_line_spells_it() -> None:
    text = "cast-io{values=img_ids:int64;txt_ids:int64}"
    assert str(Pipeline.parse(text)) == text
