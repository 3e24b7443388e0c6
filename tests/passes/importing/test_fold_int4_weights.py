"""fold-int4-weights against ModelOpt's definition of INT4 blocks, computed in plain numpy."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from passes import Pipeline, PipelineResult
from passes.canonical.fold_constants import FoldConstants
from passes.importing.fold_int4_weights import FoldInt4Weights
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe
from tests.passes.graph_helpers import check_same, error, ops, recipes, run_ort

RNG = np.random.default_rng(12)
BLOCK = 128
FLAT = """g (float[b,K] x) => (float[b,N] y) {
    d = trt.DequantizeLinear<axis = 0, block_size = 128>(w, s)
    r = Reshape(d, shape)
    t = Transpose<perm = [1, 0]>(r)
    y = MatMul(x, t)
}"""
PADDED = """g (float[b,K] x) => (float[b,N] y) {
    p = Pad(w, pads)
    f = Reshape(p, rows)
    d = trt.DequantizeLinear<axis = 0, block_size = 128>(f, s)
    r = Reshape(d, shape)
    c = Slice(r, start, end, last)
    t = Transpose<perm = [1, 0]>(c)
    y = MatMul(x, t)
}"""


def model(graph: str, values: dict[str, Any]) -> onnx.ModelProto:
    made = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 23, "trt": 1]> {graph}')
    for name, value in values.items():
        tensor = (
            value.to_tensor(name) if isinstance(value, Recipe) else onnx.numpy_helper.from_array(value, name)
        )
        made.graph.initializer.append(tensor)
    return made


def fold(made: onnx.ModelProto) -> PipelineResult:
    """Run the pass twice; what comes is no valid ONNX, what goes out must be."""
    result = Pipeline([FoldInt4Weights()]).run(made, check=lambda *_: "")
    assert Pipeline([FoldInt4Weights()]).run(result.model).changed == 0
    return result


def weights(n: int, k: int) -> tuple[Any, Any, Any]:
    """A weight [n, k], ModelOpt's scales a block of 128 of the padded rows [n, blocks], and what INT4 makes of it."""
    weight = RNG.standard_normal((n, k)).astype(np.float32) * np.exp(RNG.standard_normal((n, 1))).astype(
        np.float32
    )
    padded = np.pad(weight, [(0, 0), (0, -k % BLOCK)]).reshape(n, -1, BLOCK)
    amax = np.abs(padded).max(-1)
    scale = (amax / np.float32(7)).astype(np.float32)
    values = np.clip(np.rint(padded * (np.float32(7) / amax)[..., None]), -8, 7)
    return weight, scale, (values * scale[..., None]).reshape(n, -1)[:, :k]


def flat(n: int, k: int, as_recipe: bool) -> tuple[onnx.ModelProto, Any]:
    weight, scale, want = weights(n, k)
    rows = weight.reshape(-1, BLOCK)
    values = {
        "w": Recipe.of_array(rows) if as_recipe else rows,
        "s": scale.reshape(-1, 1),
        "shape": np.array([n, k]),
    }
    return model(FLAT.replace("K", str(k)).replace("N", str(n)), values), want


def padded(n: int, k: int) -> tuple[onnx.ModelProto, Any]:
    weight, scale, want = weights(n, k)
    full = k + -k % BLOCK
    values = {
        "w": Recipe.of_array(weight),
        "pads": np.array([0, 0, 0, full - k]),
        "rows": np.array([-1, BLOCK]),
        "s": scale.reshape(-1, 1),
        "shape": np.array([n, full]),
        "start": np.array([0]),
        "end": np.array([k]),
        "last": np.array([1]),
    }
    return model(PADDED.replace("K", str(k)).replace("N", str(n)), values), want


def check(result: PipelineResult, want: Any, k: int) -> None:
    x = RNG.standard_normal((3, k)).astype(np.float32)
    (got,) = run_ort(result.model, {"x": x})
    assert error(got, x @ want.T) < 1e-6
    assert error(got, x @ want[:, ::-1].T) > 0.5  # other weights show


@pytest.mark.parametrize("as_recipe", [True, False])
@pytest.mark.parametrize(("n", "k"), [(4, 128), (6, 384)])
def test_flattened_blocks_become_rows_of_blocks(n: int, k: int, as_recipe: bool) -> None:
    made, want = flat(n, k, as_recipe)
    result = fold(made)
    check(result, want, k)
    node = result.model.graph.node[0]
    assert {a.name: a.i for a in node.attribute} == {"axis": 1, "block_size": BLOCK}
    stored = recipes(result.model)[node.input[0]]
    assert (stored.dtype, stored.shape) == (TensorProto.INT4, (n, k))
    assert recipes(result.model)[node.input[1]].shape == (n, k // BLOCK)
    assert ops(result.model) == ["DequantizeLinear", "Transpose", "MatMul"]


@pytest.mark.parametrize(("k", "block"), [(64, 64), (320, 64), (192, 64), (400, 16)])
def test_padding_goes_and_blocks_that_do_not_fit_get_smaller(k: int, block: int) -> None:
    made, want = padded(5, k)
    result = fold(made)
    check(result, want, k)
    (node,) = (n for n in result.model.graph.node if n.op_type == "DequantizeLinear")
    assert {a.name: a.i for a in node.attribute} == {"axis": 1, "block_size": block}
    assert recipes(result.model)[node.input[0]].shape == (5, k)
    assert recipes(result.model)[node.input[1]].shape == (5, k // block)


def test_blocks_that_no_compiler_takes_are_stored_wide() -> None:
    made, want = padded(4, 200)  # 8 elements would be left of a block of 128
    result = fold(made)
    check(result, want, 200)
    assert "DequantizeLinear" not in ops(result.model)
    assert "1 weights of other ranks hold INT4 values in 16 bits" in result.records[0].notes


def test_convolutions_hold_int4_values_in_their_own_type() -> None:
    text = """g (float[1,16,8,8] x) => (float[1,4,6,6] y) {
        d = trt.DequantizeLinear<axis = 0, block_size = 16>(w, s)
        r = Reshape(d, shape)
        y = Conv<kernel_shape = [3, 3]>(x, r)
    }"""
    weight = RNG.standard_normal((4 * 9, 16)).astype(np.float32)
    scale = (np.abs(weight).max(-1, keepdims=True) / np.float32(7)).astype(np.float32)
    want = (np.clip(np.rint(weight / scale), -8, 7) * scale).reshape(4, 16, 3, 3)
    result = fold(model(text, {"w": weight, "s": scale, "shape": np.array([4, 16, 3, 3])}))
    plain = model(
        "g (float[1,16,8,8] x) => (float[1,4,6,6] y) { y = Conv<kernel_shape = [3, 3]>(x, r) }", {"r": want}
    )
    check_same(plain, result.model, {"x": RNG.standard_normal((1, 16, 8, 8)).astype(np.float32)}, 1e-6)


def test_values_are_those_of_modelopts_factor() -> None:
    """Half way between two steps x / scale and x * (7 / amax) may round apart; ModelOpt multiplies."""
    amax = (
        RNG.uniform(0.5, 4, (64, 1)).astype(ml_dtypes.bfloat16).astype(np.float32)
    )  # as 16-bit weights have
    weight = (amax * RNG.integers(-13, 14, (64, BLOCK)) / np.float32(14)).astype(np.float32)
    weight[:, :1] = amax
    values = {"w": weight, "s": amax / np.float32(7), "shape": np.array([64, BLOCK])}
    result = fold(model(FLAT.replace("K", str(BLOCK)).replace("N", "64"), values))
    got = evaluate(recipes(result.model)[result.model.graph.node[0].input[0]]).astype(np.float32)
    want = np.clip(np.rint(weight * (np.float32(7) / amax)), -8, 7)
    other = np.clip(np.rint(weight / (amax / np.float32(7))), -8, 7)
    # The export holds amax / 7, from which one amax in fourteen comes back an ulp off.
    assert np.mean(got != want) < 0.2 * np.mean(other != want)
    assert np.mean(other != want) > 0.01


def test_names_are_those_of_the_torch_model() -> None:
    made, _ = flat(4, 128, as_recipe=True)
    made.graph.node[0].name = "/blocks.0/attn/to_q/weight_quantizer/DequantizeLinear"
    assert "blocks.0.attn.to_q.weight_q" in recipes(fold(made).model)


def test_refusals_say_why() -> None:
    made, _ = flat(4, 256, as_recipe=True)
    wrong = made.graph.initializer[1]
    wrong.CopyFrom(onnx.numpy_helper.from_array(np.ones((4, 1), np.float32), "s"))
    result = Pipeline([FoldInt4Weights()]).run(made, check=lambda *_: "")
    assert result.changed == 0
    assert (
        result.records[0].refusals[0].reason == "its scale is (4, 1), and not one for each of 8 blocks of 128"
    )


def test_stored_int4_stays_as_it_is() -> None:
    made, _ = flat(4, 128, as_recipe=True)
    stored = fold(made).model
    assert Pipeline([FoldConstants(), FoldInt4Weights()]).run(stored).records[1].changed == 0
