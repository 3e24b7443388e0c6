import ml_dtypes
import numpy as np
import onnx
import pytest

from passes.targets.ort.guard_slices import GuardSlices
from tests.passes.graph_helpers import apply, check_same, materialize, model, ops

RNG = np.random.default_rng(5)
E4M3, INT8 = np.array(0, ml_dtypes.float8_e4m3fn), np.array(0, np.int8)
FEEDS = {"x": RNG.standard_normal((2, 6, 8)).astype(np.float16), "n": np.array([4], np.int64)}


def sliced(zero: np.ndarray, between: str = "r = Reshape(s, shape)") -> onnx.ModelProto:
    return model(
        f"""g (float16[b,t,8] x, int64[1] n) => (float16[b,m,4] y) {{
            s = Slice(x, start, n, axis)
            {between}
            q = QuantizeLinear(r, scale, zero)
            d = DequantizeLinear(q, scale, zero)
            y = MatMul(d, w)
        }}""",
        {
            "start": np.array([1], np.int64),
            "axis": np.array([1], np.int64),
            "shape": np.array([0, -1, 8], np.int64),
            "scale": np.array(0.02, np.float16),
            "zero": zero,
            "w": RNG.standard_normal((8, 4)).astype(np.float16),
        },
    )


def optimized(made: onnx.ModelProto) -> np.ndarray:
    """As ONNX Runtime runs it by default."""
    import onnxruntime as ort

    session = ort.InferenceSession(materialize(made).SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, FEEDS)
    return np.asarray(result)


@pytest.mark.parametrize("between", ["r = Reshape(s, shape)", "r = Identity(s)"])
def test_onnx_runtime_takes_the_guarded_graph_and_rejects_the_other(between: str) -> None:
    before = sliced(E4M3, between)
    if "Reshape" in between:  # else ONNX Runtime removes the Identity first, or not: both are fine
        with pytest.raises(Exception, match=r"float8e4m3fn.*Slice"):
            optimized(before)
    after = apply(before, GuardSlices())
    check_same(before, after.model, FEEDS)
    if "Reshape" in between:
        assert after.changed == 1
        assert ops(after.model)[:3] == ["Slice", "Concat", "Reshape"]
        check_same(
            before, after.model, FEEDS, 1e-2, runner=lambda made, _: [optimized(made)], reference=plain
        )


def plain(made: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    from tests.passes.graph_helpers import run_ort

    return run_ort(made, feeds)


def test_int8_and_a_computed_tensor_are_left_alone() -> None:
    assert apply(sliced(INT8), GuardSlices()).changed == 0
    assert apply(sliced(E4M3, "r = Relu(s)"), GuardSlices()).changed == 0


def test_one_guard_serves_many_quantizers_and_an_output() -> None:
    before = sliced(E4M3)
    text = onnx.helper.make_node("QuantizeLinear", ["s", "scale", "zero"], ["q2"], "q2")
    before.graph.node.insert(2, text)
    before.graph.output.append(onnx.helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT16, None))
    after = apply(before, GuardSlices())
    assert after.changed == 1
    assert [o.name for o in after.model.graph.output] == ["y", "s"]
    check_same(before, after.model, FEEDS)
