from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import ModelProto

from diffc.errors import DiffcError
from passes import Pipeline
from passes.presets import target_passes
from passes.targets.ort.add_trt_functions import AddTrtFunctions
from passes.targets.ort.emulate_fp4 import EmulateFp4
from passes.targets.tensorrt.add_zero_bias import AddZeroBias
from passes.targets.tensorrt.type_trt_ops import TypeTrtOps
from tests.passes.graph_helpers import apply, check_same, ops
from tests.passes.trt_helpers import trt_model

FP4, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
C, HEADS = 128, 2


def layer(name: str, bias: bool) -> str:
    """An NVFP4 layer without a bias, or with one, from the quantized input `xh` to heads."""
    return f"""
        {name}w = DequantizeLinear({name}_blocks, {name}_scale)
        {name}d = DequantizeLinear<axis = -1, block_size = 16>({name}_weight, {name}w)
        {name}h = Cast<to = 10>({name}d)
        {name}t = Transpose<perm = [1, 0]>({name}h)
        {name}m = MatMul(xh, {name}t)
        {f"{name}b = Add({name}m, {name}_bias)" if bias else f"{name}b = Identity({name}m)"}
        {name}r = Reshape({name}b, heads)
        {name} = Transpose<perm = [0, 2, {"3, 1" if name == "k" else "1, 3"}]>({name}r)"""


def pair(made: str, given: str) -> str:
    return f"{made}_q = QuantizeLinear({given}, step, zero)\n{made} = DequantizeLinear({made}_q, step, zero)"


def attention(
    scales: tuple[float, float] = (3e-4, 3e-4),
    biases: tuple[bool, bool] = (False, False),
    *,
    fp8: bool = True,
) -> ModelProto:
    """Cross attention: keys and values from NVFP4 layers of one input, their weights' global scales as given."""
    rng = np.random.default_rng(7)
    values: dict[str, Any] = {
        "x_scale": np.array(4 / 2688, np.float32),
        "step": np.array(0.02, np.float16),
        "zero": np.array(0, E4M3),
        "heads": np.array([0, 0, HEADS, C // HEADS]),
    }
    for name, scale in zip("kv", scales, strict=True):
        values[f"{name}_weight"] = (rng.standard_normal((C, C)) * 2.5).astype(FP4)
        values[f"{name}_blocks"] = rng.uniform(20, 400, (C, C // 16)).astype(E4M3)
        values[f"{name}_scale"] = np.array(scale, np.float32)
        values[f"{name}_bias"] = rng.standard_normal(C).astype(np.float16)
    pairs = [pair(f"{name}p", name) if fp8 else f"{name}p = Identity({name})" for name in ("q", "k", "v")]
    softmax = pair("p", "soft") if fp8 else "p = Identity(soft)"
    made = trt_model(
        f"""g (float16[b,t,{C}] x, float16[b,{HEADS},n,{C // HEADS}] q) => (float16[b,h,n,d] y) {{
            xq, xb = trt.TRT_FP4DynamicQuantize<axis = -1, block_size = 16, scale_type = 17>(x, x_scale)
            xw = DequantizeLinear(xb, x_scale)
            xd = DequantizeLinear<axis = -1, block_size = 16>(xq, xw)
            xh = Cast<to = 10>(xd)
            {layer("k", biases[0])}
            {layer("v", biases[1])}
            {pairs[0]} {pairs[1]} {pairs[2]}
            scores = MatMul(qp, kp)
            soft = Softmax<axis = -1>(scores)
            {softmax}
            y = MatMul(p, vp)
        }}""",
        values,
    )
    for number, node in enumerate(made.graph.node):
        node.name = f"{node.op_type}_{number}"
    return Pipeline((TypeTrtOps(),)).run(made).model


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((2, 20, C)).astype(np.float16)
    x[0, :3] = -0.0  # rows whose products are zeros
    return {"x": x, "q": rng.standard_normal((2, HEADS, 24, C // HEADS)).astype(np.float16)}


def biases(made: ModelProto) -> list[np.ndarray]:
    """The constants that the pass added."""
    return [onnx.numpy_helper.to_array(t) for t in made.graph.initializer if "zero_bias" in t.name]


def test_layers_of_one_scale_get_a_bias_that_changes_no_bit() -> None:
    before = attention()
    after = apply(before, AddZeroBias()).model
    assert ops(after).count("Add") == ops(before).count("Add") + 2
    (bias,) = biases(after)  # both layers read the same
    assert bias.shape == (C,)
    assert bias.dtype == np.float16
    assert np.signbit(bias).all()
    assert not bias.any()
    emulated = [Pipeline((EmulateFp4(), AddTrtFunctions())).run(made).model for made in (before, after)]
    check_same(emulated[0], emulated[1], feeds())
    damaged = ModelProto.FromString(emulated[1].SerializeToString())
    (tensor,) = (t for t in damaged.graph.initializer if "zero_bias" in t.name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(bias + np.float16(0.05), tensor.name))
    with pytest.raises(AssertionError, match="output 0"):
        check_same(emulated[0], damaged, feeds())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_minus_zero_changes_no_number(dtype: Any) -> None:
    """Zero would: -0.0 + 0.0 is 0.0."""
    x = np.array(
        [0.0, -0.0, 1.5, -3.0, np.inf, -np.inf, float(ml_dtypes.finfo(dtype).smallest_subnormal)], dtype
    )
    assert (x + np.array(-0.0, dtype)).tobytes() == x.tobytes()
    assert (x + np.array(0.0, dtype)).tobytes() != x.tobytes()


@pytest.mark.parametrize(("given", "added"), [((True, True), 0), ((True, False), 1), ((False, True), 1)])
def test_a_bias_that_is_there_serves(given: tuple[bool, bool], added: int) -> None:
    assert apply(attention(biases=given), AddZeroBias()).changed == added


def test_not_for_other_scales_nor_without_fp8_attention() -> None:
    assert apply(attention((3e-4, 4e-4)), AddZeroBias()).changed == 0
    assert apply(attention(fp8=False), AddZeroBias()).changed == 0


def test_where_the_columns_are_not_known_it_says_so() -> None:
    graph = gs.import_onnx(attention())
    graph.tensors()["km"].shape = None
    result = AddZeroBias().run(graph)
    assert result.changed == 1
    assert [("km" in refusal.reason, refusal.node[:6]) for refusal in result.refusals] == [(True, "MatMul")]


@pytest.mark.parametrize("target", ["trt-rtx", "tensorrt", "ort-trt-rtx"])
def test_tensorrt_gets_it(target: str) -> None:
    steps = [step.name for step in target_passes(target)]
    assert steps.index("fuse-qdq") < steps.index("add-zero-bias")


def engine(folder: Path, made: ModelProto) -> int:
    """Bytes of the engine that TensorRT-RTX builds for SM120."""
    from diffc.backends.profile import Profile
    from tests.networks import build

    shapes = [
        {"x": (b, t, C), "q": (b, HEADS, n, C // HEADS)}
        for b, t, n in ((1, 19, 16), (2, 77, 64), (4, 154, 144))
    ]
    copy = ModelProto.FromString(made.SerializeToString())  # saving takes the weights out
    return build(folder, copy, (120,), profiles=(Profile.of_shapes(*shapes),)).nbytes


class TestEngine:
    def test_the_builder_takes_it_with_the_pass_only(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        before = attention()
        with pytest.raises(DiffcError, match=r"perm\.size(.|\n)*Fix: run the pass add-zero-bias"):
            engine(tmp_path / "before", before)
        assert engine(tmp_path / "after", apply(before, AddZeroBias()).model) > C * C

    def test_one_layer_with_a_bias_is_not_enough(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        before = attention(biases=(True, False))
        with pytest.raises(DiffcError, match=r"perm\.size"):
            engine(tmp_path / "before", before)
        assert engine(tmp_path / "after", apply(before, AddZeroBias()).model) > C * C

    def test_the_target_as_a_whole(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        assert engine(tmp_path / "all", apply(attention(), *target_passes("trt-rtx")).model) > C * C
