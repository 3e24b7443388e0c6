"""Every form of quantized weight that the import knows, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffc.cli.main import run
from diffc.compile.import_check import ImportCheck
from diffc.compile.import_onnx import import_model, import_result
from diffc.errors import DiffcError
from diffc.frontend.onnx_file import read_model
from diffc.frontend.onnx_interface import name_interface
from diffc.validate.float32 import cpu_session, feed, float32_copy
from passes import PassCheckError, PassError, Pipeline
from passes.canonical.fold_constants import FoldConstants
from passes.storage import load, save, weight_bytes
from passes.weights.recipe import Recipe
from tests.networks import rel_l2

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
FP8, INT4, FP4 = TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1


def model(graph: str, values: dict[str, Any] | None = None, opset: int = 23, ir: int = 11) -> onnx.ModelProto:
    made = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}, "trt": 1]> {graph}')
    made.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), n) for n, v in (values or {}).items()
    )
    return made


def imported(made: onnx.ModelProto, folder: Path, **options: Any) -> onnx.ModelProto:
    onnx.save(made, folder / "in.onnx", **options)
    return import_model(folder / "in.onnx")


def outputs(made: onnx.ModelProto, feeds: dict[str, Any]) -> Any:
    twin = float32_copy(made)
    with cpu_session(twin) as session:
        return next(iter(session.run(feed(twin, feeds)).values()))


RNG = np.random.default_rng(21)
DISGUISED = """g (float16[1,8,6,6] x) => (float16[1,4,6,6] y) {
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
    wq = QuantizeLinear(w, ws, z) wd = DequantizeLinear(wq, ws, z)
    c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(d, wd)
    y = Relu(c)
}"""
LINEAR = """g (float16[b,32] x) => (float16[b,8] y) {
    q = trt.TRT_FP8QuantizeLinear(x, s) d = trt.TRT_FP8DequantizeLinear(q, s)
    wq = trt.TRT_FP8QuantizeLinear(w, ws) wd = trt.TRT_FP8DequantizeLinear(wq, ws)
    t = Transpose<perm = [1, 0]>(wd)
    m = MatMul(d, t)
    y = Add(m, bias)
}"""


def linear_values() -> dict[str, Any]:
    weight = RNG.standard_normal((8, 32)).astype(np.float16)
    return {
        "s": np.array([0.011], np.float16),
        "w": weight,
        "ws": np.array(np.abs(weight).max() / 448, np.float16),
        "bias": RNG.standard_normal(8).astype(np.float32),
    }


def linear_by_hand(x: Any, values: dict[str, Any]) -> Any:
    def quantized(data: Any, scale: Any) -> Any:
        wide = np.clip(data.astype(np.float32) / np.float32(scale), -448, 448)
        return wide.astype(E4M3).astype(np.float32) * np.float32(scale)

    return quantized(x, values["s"][0]) @ quantized(values["w"], values["ws"]).T + values["bias"]


class TestForms:
    @pytest.mark.parametrize("opset", range(17, 24))
    def test_any_opset(self, opset, tmp_path):
        values = linear_values()
        result = imported(model(LINEAR, values, opset, ir=8), tmp_path)
        assert result.opset_import[0].version == 23
        assert result.ir_version == 11
        assert [(o.domain, o.version) for o in result.opset_import] == [("", 23)]
        stored = {t.data_type for t in result.graph.initializer if len(t.dims) == 2}
        assert stored == {FP8}
        x = RNG.standard_normal((5, 32)).astype(np.float16)
        assert rel_l2(outputs(result, {"x": x}), linear_by_hand(x, values)) < 1e-3

    @pytest.mark.parametrize("where", ["initializer", "input", "external", "constant"])
    def test_weights_wherever_they_are(self, where, tmp_path):
        values = linear_values() | {"w": RNG.standard_normal((8, 512)).astype(np.float16)}
        values["ws"] = np.array(np.abs(values["w"]).max() / 448, np.float16)
        made, options = model(LINEAR.replace("b,32", "b,512"), values, 20, ir=9), {}
        if where == "input":
            made.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT16, [8, 512]))
        if where == "external":
            options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 1024}
        if where == "constant":
            (weight,) = (t for t in made.graph.initializer if t.name == "w")
            made.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
            made.graph.initializer.remove(weight)
        result = imported(made, tmp_path, **options)
        assert [v.name for v in result.graph.input] == ["x"]
        (stored,) = (t for t in result.graph.initializer if len(t.dims) == 2)
        recipe = Recipe.of_tensor(stored)
        assert recipe is not None
        assert recipe.dtype == FP8
        assert recipe.source.kind == ("raw" if where == "external" else "memory")
        x = RNG.standard_normal((3, 512)).astype(np.float16)
        assert rel_l2(outputs(result, {"x": x}), linear_by_hand(x, values)) < 1e-3

    def test_a_graph_of_marks_is_not_compared_and_says_so(self, tmp_path):
        text = """g (float16[b,128] x) => (float16[b,8] y) {
            d = trt.DequantizeLinear<axis = 0, block_size = 128>(w, s) t = Transpose<perm = [1, 0]>(d)
            m = MatMul(x, t) y = Add(m, bias)
        }"""
        weight = RNG.standard_normal((8, 128)).astype(np.float16)
        scale = (np.abs(weight).max(-1, keepdims=True) / 7).astype(np.float32)
        bias = RNG.standard_normal(8).astype(np.float32)
        onnx.save(model(text, {"w": weight, "s": scale, "bias": bias}, 20), tmp_path / "in.onnx")
        result = import_result(tmp_path / "in.onnx")
        checks = {record.name: record.check for record in result.records if record.changed}
        assert "numbers not compared: before it, 1 nodes only marked" in checks["fold-int4-weights"]
        assert "outputs within" in checks["match-types"]
        x = RNG.standard_normal((3, 128)).astype(np.float16)
        values = np.clip(np.rint(weight.astype(np.float32) / scale), -8, 7) * scale
        assert rel_l2(outputs(result.model, {"x": x}), x @ values.T + bias) < 2e-3

    def test_convolutions_disguised_as_int8(self, tmp_path):
        weight = RNG.standard_normal((4, 8, 3, 3)).astype(np.float16)
        values = {"w": weight, "ws": np.array(np.abs(weight).max() / 448, np.float16)}
        values["s"] = np.array(0.02, np.float16)
        made = model(DISGUISED, values, 20, ir=9)
        zero_point = helper.make_node(
            "Constant", [], ["z"], value=numpy_helper.from_array(np.zeros((), E4M3))
        )
        made.graph.node.insert(0, zero_point)
        for name in ("q", "wq"):  # what the exporter said before zero points were flipped
            made.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.INT8, None))
        result = imported(made, tmp_path)
        stored = {t.data_type for t in result.graph.initializer if len(t.dims) == 4}
        assert stored == {FP8}
        types = {v.name: v.type.tensor_type.elem_type for v in result.graph.value_info}
        assert types["q"] == FP8

    def test_group_normalization_of_an_old_opset(self, tmp_path):
        text = """g (float16[2,8,4,4] x) => (float16[2,8,4,4] y) {
            q = trt.TRT_FP8QuantizeLinear(x, s) d = trt.TRT_FP8DequantizeLinear(q, s)
            y = GroupNormalization<num_groups = 2>(d, scale, bias)
        }"""
        values = {"s": np.array(0.02, np.float16)}
        values |= {k: RNG.standard_normal(2).astype(np.float16) for k in ("scale", "bias")}
        result = imported(model(text, values, 18, ir=8), tmp_path)
        x = RNG.standard_normal((2, 8, 4, 4)).astype(np.float16)
        data = (
            np.clip(x.astype(np.float32) / np.float32(values["s"]), -448, 448).astype(E4M3).astype(np.float32)
        )
        groups = (data * np.float32(values["s"])).reshape(2, 2, -1)
        normal = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
        wide = {k: values[k].astype(np.float32)[None, :, None] for k in ("scale", "bias")}
        want = (normal * wide["scale"] + wide["bias"]).reshape(x.shape)
        assert rel_l2(outputs(result, {"x": x}), want) < 2e-3

    def test_functions_of_another_opset(self, tmp_path):
        made = model("g (float16[b,32] x) => (float16[b,32] y) { y = local.Twice(x) }", opset=19, ir=9)
        made.opset_import.append(helper.make_opsetid("local", 1))
        body = [helper.make_node("Add", ["x", "x"], ["y"], "add")]
        opsets = [helper.make_opsetid("", 18)]
        made.functions.append(helper.make_function("local", "Twice", ["x"], ["y"], body, opsets))
        result = imported(made, tmp_path)
        x = RNG.standard_normal((3, 32)).astype(np.float16)
        assert rel_l2(outputs(result, {"x": x}), 2.0 * x) < 1e-3

    def test_names_of_the_family(self):
        inputs = [
            ("onnx::Conv_0", [2, 4, 128, 128]),
            ("onnx::Cast_1", [1]),
            ("hidden.3", [2, 77, 2048]),
            ("added_cond_kwargs.text_embeds", [2, 1280]),
            ("added_cond_kwargs.time_ids", [2, 6]),
        ]
        graph = interface(inputs)
        notes = name_interface(graph)
        assert [v.name for v in graph.input] == [
            "sample",
            "timestep",
            "encoder_hidden_states",
            "text_embeds",
            "time_ids",
        ]
        assert graph.node[0].input[0] == "sample"
        assert graph.output[0].name == "out_sample"
        assert notes[0].startswith("the interface of sdxl: ")

    def test_names_of_sd3(self):
        shapes = [["b", 16, "h", "w"], ["b", 333, 4096], ["b", 2048], ["steps"]]
        graph = interface([(f"onnx::Mul_{i}", shape) for i, shape in enumerate(shapes)])
        name_interface(graph)
        want = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
        assert [v.name for v in graph.input] == want

    @pytest.mark.parametrize(
        "inputs",
        [
            [("onnx::Mul_0", [1, 2]), ("input.1", [3])],
            [
                ("onnx::Mul_0", [2, 16, 8, 8]),
                ("x.1", [3, 77, 64]),
                ("x.2", [2, 32]),
                ("x.3", [1]),
            ],  # two batches
        ],
    )
    def test_other_interfaces_keep_their_names(self, inputs):
        graph = interface(inputs)
        assert name_interface(graph) == []
        assert [v.name for v in graph.input] == [name for name, _ in inputs]

    def test_names_that_mean_something_stay(self):
        shapes = [[2, 16, 8, 8], [2, 333, 4096], [2, 2048], [1]]
        graph = interface(
            [(name, shape) for name, shape in zip(("latent", "text", "pooled", "t"), shapes, strict=True)]
        )
        name_interface(graph)
        assert [v.name for v in graph.input] == ["latent", "text", "pooled", "t"]


def interface(inputs: list[tuple[str, list[Any]]]) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name, shape in inputs]
    node = helper.make_node("Identity", [inputs[0][0]], ["1285"], "n")
    return helper.make_graph(
        [node], "g", values, [helper.make_tensor_value_info("1285", TensorProto.FLOAT16, None)]
    )


class TestBadInput:
    def test_a_missing_and_a_corrupt_file(self, tmp_path, capsys):
        with pytest.raises(PassError, match="no such file"):
            import_model(tmp_path / "none.onnx")
        (tmp_path / "bad.onnx").write_bytes(RNG.bytes(500))
        assert run(["import", str(tmp_path / "bad.onnx"), "-o", str(tmp_path / "o.onnx")]) == 1
        assert "is not an ONNX model" in capsys.readouterr().err
        assert not (tmp_path / "o.onnx").exists()

    def test_missing_external_data(self, tmp_path):
        values = linear_values() | {"w": RNG.standard_normal((8, 512)).astype(np.float16)}
        onnx.save(
            model(LINEAR.replace("b,32", "b,512"), values, 20),
            tmp_path / "in.onnx",
            save_as_external_data=True,
            location="w.bin",
        )
        (tmp_path / "w.bin").unlink()
        with pytest.raises(PassError, match=r"tensor '.*' is missing|w.bin is missing"):
            import_model(tmp_path / "in.onnx")

    @pytest.mark.parametrize("op", ["trt.TRT_Mystery", "plugins.Fused", "Nothing"])
    def test_an_unknown_operator_is_named_with_its_node(self, op, tmp_path):
        made = model(f"g (float16[b,32] x) => (float16[b,32] y) {{ y = {op}(x) }}")
        made.graph.node[0].name = "block.7/odd"
        made.opset_import.append(helper.make_opsetid("plugins", 1))
        with pytest.raises(DiffcError, match=r"node 'block.7/odd'\)(.|\n)*Fix: export the model without"):
            imported(made, tmp_path)

    def test_an_old_opset(self, tmp_path):
        text = "g (float[b,32] x) => (float[b,32] y) { y = Relu(x) }"
        assert imported(model(text, opset=15, ir=8), tmp_path).opset_import[0].version == 23
        with pytest.raises(PassError, match="opset 6; rewrite-opset takes opset 7 and later"):
            imported(model(text, opset=6, ir=3), tmp_path)

    def test_a_quantizer_that_cannot_be_read_is_named(self, tmp_path):
        text = """g (float16[b,32] x) => (float16[b,32] y) {
            d = trt.DequantizeLinear<axis = 0, block_size = 16>(w, s) y = MatMul(x, d)
        }"""
        values = {"w": RNG.standard_normal((32, 32)).astype(np.float16), "s": np.ones((3, 1), np.float16)}
        made = model(text, values, 20)
        made.graph.node[0].name = "block/weight_quantizer/DequantizeLinear"
        with pytest.raises(
            DiffcError, match="'block/weight_quantizer/DequantizeLinear' could not be brought"
        ):
            imported(made, tmp_path)

    def test_a_pass_that_changes_numbers_is_caught(self, tmp_path):
        values = linear_values()
        onnx.save(model(LINEAR, values, 23), tmp_path / "in.onnx")
        good = (
            Pipeline([FoldConstants()]).run(read_model(tmp_path / "in.onnx").model, check=lambda *_: "").model
        )
        wrong = onnx.ModelProto()
        wrong.CopyFrom(good)
        (scale,) = (t for t in wrong.graph.initializer if t.name == "ws")
        scale.CopyFrom(numpy_helper.from_array(values["ws"] * np.float16(1.01), "ws"))
        check = ImportCheck()
        check(None, good, None)
        with pytest.raises(PassCheckError, match="changed output 'y'"):
            check(good, wrong, FoldConstants())
        assert "outputs within 0.0e+00" in ImportCheck()(good, good, FoldConstants())

    def test_a_pass_after_which_nothing_runs_is_caught(self, tmp_path):
        onnx.save(model(LINEAR, linear_values() | {"bias": np.ones(8, np.float16)}, 23), tmp_path / "in.onnx")
        good = read_model(tmp_path / "in.onnx").model
        wrong = onnx.ModelProto()
        wrong.CopyFrom(good)
        wrong.graph.node[-1].op_type = "Mod"  # of floats without fmod: ONNX Runtime refuses
        with pytest.raises(
            PassCheckError, match="ONNX Runtime ran the graph before it; after it, it did not run"
        ):
            ImportCheck()(good, wrong, FoldConstants())


def test_large_weights_are_never_read_while_importing(tmp_path, monkeypatch):
    values = linear_values() | {"w": RNG.standard_normal((8, 4096)).astype(np.float16)}
    onnx.save(
        model(LINEAR.replace("b,32", "b,4096"), values, 20),
        tmp_path / "in.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=1024,
    )
    monkeypatch.setattr("diffc.compile.import_check.NUMERIC_LIMIT", 1)
    monkeypatch.setattr("passes.weights.sources.np.memmap", lambda *_: pytest.fail("the weights were read"))
    result = import_model(tmp_path / "in.onnx")
    assert weight_bytes(result) < 0.6 * values["w"].nbytes
    monkeypatch.undo()
    save(result, tmp_path / "out.onnx")
    x = RNG.standard_normal((3, 4096)).astype(np.float16)
    assert rel_l2(outputs(load(tmp_path / "out.onnx"), {"x": x}), linear_by_hand(x, values)) < 1e-3
