"""ModelOpt's own exports, through the import, against the outputs that its torch models recorded; and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffc.backends.engine import EngineRequest, build_engine
from diffc.cli import run
from diffc.errors import DiffcError
from diffc.frontend.imported import name_interface, read_model
from diffc.importing import ImportCheck, import_model, import_result, marks
from diffc.validate.twin import cpu_session, feed, float32_twin
from passes import PassCheckError, PassError, Pipeline
from passes.check import check_structure, infer_types
from passes.fold_constants import FoldConstants
from passes.kernels import evaluate
from passes.storage import load, materialize, save, weight_bytes
from passes.weights import Recipe

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [base / "shared/fixtures/modelopt-0.47-flux" for base in (ROOT, ROOT.parent)]
FIXTURES = next((folder for folder in FOLDERS if folder.is_dir()), None)
needs_fixtures = pytest.mark.skipif(FIXTURES is None, reason="ModelOpt's exports are not here")
INPUTS = [
    "hidden_states",
    "encoder_hidden_states",
    "pooled_projections",
    "timestep",
    "img_ids",
    "txt_ids",
    "guidance",
]
LIMITS = {"mxfp8": 2e-2, "fp8": 2e-2, "int4awq": 5e-2, "w4a8": 5e-2, "nvfp4": 5e-2, "svd": 5e-2}
SMS = {"nvfp4": (120,), "svd": (120,)}
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
FP8, INT4, FP4 = TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1
# Stored types of the 28 quantized layers, block scales included where they have a type of their own.
STORED = {
    "fp8": {FP8: 28},
    "mxfp8": {FP8: 28, TensorProto.UINT8: 28},
    "int4awq": {INT4: 28},
    "w4a8": {INT4: 28},
    "nvfp4": {FP4: 28, FP8: 28},
    "svd": {FP4: 28, FP8: 28},
}


class Export:
    """One fixture: its imported model, recorded inputs and output."""

    def __init__(self, name: str):
        assert FIXTURES is not None
        self.name, self.path = name, FIXTURES / f"flux_{name}.onnx"
        self.model = import_result(self.path, check_numbers=False).model
        with np.load(FIXTURES / f"flux_{name}.npz") as held:
            self.feeds = {key.removeprefix("in_"): held[key] for key in held if key != "out"}
            self.want = held["out"].astype(np.float64)

    def error(self, model: onnx.ModelProto) -> float:
        return rel_l2(self.run(model), self.want)

    def run(self, model: onnx.ModelProto) -> Any:
        with cpu_session(model) as session:
            return session.run(feed(model, self.feeds))["out_hidden_states"].astype(np.float64)


def rel_l2(got: Any, want: Any) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def exports() -> Any:
    made: dict[str, Export] = {}

    def get(name: str) -> Export:
        if name not in made:
            made[name] = Export(name)
        return made[name]

    return get


def rounded_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 twin with every tensor rounded to bfloat16 that is one in the model: torch's arithmetic."""
    values = [*infer_types(model).graph.value_info]
    halves = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    twin = float32_twin(model)
    nodes, renamed = list[onnx.NodeProto](), dict[str, str]()
    outputs = {output.name for output in twin.graph.output}
    for node in twin.graph.node:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        for index, name in enumerate(copy.input):
            copy.input[index] = renamed.get(name, name)
        nodes.append(copy)
        for name in (n for n in copy.output if n in halves - outputs):
            nodes.append(
                helper.make_node("Cast", [name], [f"{name}/16"], f"{name}/to16", to=TensorProto.BFLOAT16)
            )
            nodes.append(helper.make_node("Cast", [f"{name}/16"], [f"{name}/32"], f"{name}/to32", to=1))
            renamed[name] = f"{name}/32"
    assert len(renamed) > 100
    del twin.graph.node[:]
    twin.graph.node.extend(nodes)
    return twin


@needs_fixtures
class TestExports:
    @pytest.mark.parametrize("name", LIMITS)
    def test_the_result_is_canonical(self, name, exports):
        model = exports(name).model
        check_structure(None, model, None)
        assert ([(o.domain, o.version) for o in model.opset_import if o.domain == ""], model.ir_version) == (
            [("", 23)],
            11,
        )
        assert [value.name for value in model.graph.input] == INPUTS
        assert [value.name for value in model.graph.output] == ["out_hidden_states"]
        trt = {node.op_type for node in model.graph.node if node.domain == "trt"}
        assert trt <= {"TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear"}
        assert not marks(model)
        known = {v.name: v.type.tensor_type for v in model.graph.value_info}
        for node in (node for node in model.graph.node if node.domain == "trt"):
            assert all(known[out].elem_type and known[out].HasField("shape") for out in node.output)

    @pytest.mark.parametrize("name", LIMITS)
    def test_weights_are_stored_as_small_as_their_format(self, name, exports):
        stored = exports(name).model.graph.initializer
        for kind, count in STORED[name].items():
            assert sum(t.data_type == kind and len(t.dims) > 1 for t in stored) == count

    @pytest.mark.parametrize("name", ["mxfp8", "int4awq", "w4a8"])
    def test_outputs_are_those_of_modelopts_torch_model(self, name, exports):
        export = exports(name)
        assert (
            min(export.error(float32_twin(export.model)), export.error(rounded_twin(export.model)))
            < LIMITS[name]
        )

    @pytest.mark.parametrize("name", ["nvfp4", "svd"])
    def test_fp4_outputs_are_as_near_as_two_arithmetics_are(self, name, exports):
        """Half a step of E2M1 is up to a quarter of a value: float32 and bfloat16 runs of one graph lie 5 % apart."""
        export = exports(name)
        wide, narrow = export.run(float32_twin(export.model)), export.run(rounded_twin(export.model))
        floor = rel_l2(narrow, wide)
        assert 0.03 < floor < 0.07
        assert min(rel_l2(wide, export.want), rel_l2(narrow, export.want)) < max(LIMITS[name], 1.2 * floor)

    @pytest.mark.parametrize("name", LIMITS)
    def test_one_wrong_layer_shows(self, name, exports):
        export = exports(name)
        damaged = onnx.ModelProto()
        damaged.CopyFrom(export.model)
        kind = next(iter(STORED[name]))
        (weight,) = (
            t
            for t in damaged.graph.initializer
            if t.name.startswith("x_embedder.weight") and t.data_type == kind
        )
        recipe = Recipe.of_tensor(weight)
        weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(evaluate(recipe)[::-1]), weight.name))
        assert export.error(float32_twin(damaged)) > 2 * LIMITS[name]

    def test_fp8_falls_short_by_what_the_export_rounded_off(self, exports):
        """ModelOpt's exporter writes FP8 scales in bfloat16, amax / 448 to 8 bits; the torch model has them in float32.

        The amax of a weight is in the file, and rounds to the scale that was written. That of an activation was a
        bfloat16 number, so that it is one of two at most. With those scales the same graph meets the limit.
        """
        export = exports("fp8")
        twin = float32_twin(export.model)
        assert LIMITS["fp8"] < export.error(twin) < 4e-2
        assert export.error(with_exact_scales(twin, raw_weights(export.path))) < LIMITS["fp8"]

    @pytest.mark.parametrize("name", LIMITS)
    def test_engines_build(self, name, exports, tmp_path):
        pytest.importorskip("tensorrt_rtx")
        path = tmp_path / "model.onnx"
        save(exports(name).model, path)
        sms = SMS.get(name, (89, 120))
        report = build_engine(EngineRequest("trt-rtx", path, tmp_path / "m.engine", sms))
        assert report.sms == sms
        assert report.nbytes > 1 << 20

    def test_the_command_compares_every_pass_and_says_what_was_done(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        output = tmp_path / "out.onnx"
        assert run(["import", str(FIXTURES / "flux_fp8.onnx"), "-o", str(output)]) == 0
        shown = capsys.readouterr().out
        assert "inputs.1 is hidden_states" in shown
        assert "normalize-qdq: 124 operators of TensorRT that ONNX has" in shown
        assert "fold-weight-qdq: 28 weights stored quantized" in shown
        rows = [line for line in shown.splitlines() if "->" in line and "unchanged" not in line]
        assert len(rows) >= 6
        assert all("outputs within" in row for row in rows)
        onnx.checker.check_model(str(output), full_check=True)
        size = output.stat().st_size + output.with_name("out.onnx_data").stat().st_size
        assert size < 0.65 * (FIXTURES / "flux_fp8.onnx").stat().st_size  # 16-bit weights are 8-bit
        assert run(["import", str(FIXTURES / "flux_fp8.onnx"), "-o", str(output)]) == 1
        assert "exists" in capsys.readouterr().err


def raw_weights(path: Path) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t).astype(np.float32) for t in onnx.load(path).graph.initializer}


def with_exact_scales(twin: onnx.ModelProto, weights: dict[str, Any]) -> onnx.ModelProto:
    """FP8 scales as they were before the exporter rounded them, and weights quantized by them."""
    model = materialize(twin)
    held = {t.name: t for t in model.graph.initializer}
    recipes = {t.name: Recipe.of_tensor(t) for t in twin.graph.initializer}
    for index, node in enumerate(
        n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")
    ):
        written = numpy_helper.to_array(held[node.input[1]]).astype(np.float32)
        weight = weights.get(node.input[0].removesuffix("_q"))
        if weight is not None:
            amax = np.abs(weight).max()
            assert bf16(np.float32(amax / 448)) == written
            stored = np.clip(weight * (np.float32(1) / amax * np.float32(448)), -448, 448).astype(E4M3)
            moves = [op.args["perm"] for op in recipes[node.input[0]].ops if op.name == "transpose"]
            stored = np.ascontiguousarray(stored.transpose(moves[0]) if moves else stored)
            held[node.input[0]].CopyFrom(numpy_helper.from_array(stored, node.input[0]))
        else:
            bits = int(np.array(written * 448, BF16).view(np.uint16))
            near = [np.array(bits + step, np.uint16).view(BF16).astype(np.float32) for step in range(-2, 3)]
            fitting = [value for value in near if bf16(np.float32(value / np.float32(448))) == written]
            assert 1 <= len(fitting) <= 2
            amax = fitting[-1]
        node.input[1] = f"exact_{index}"
        model.graph.initializer.append(
            numpy_helper.from_array(np.array(amax / 448, np.float32), node.input[1])
        )
    return model


def bf16(value: Any) -> Any:
    return np.asarray(value, np.float32).astype(BF16).astype(np.float32)


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
    twin = float32_twin(made)
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
        with pytest.raises(DiffcError, match=r"node 'block.7/odd'\)(.|\n)*Mend: export the model without"):
            imported(made, tmp_path)

    def test_an_old_opset(self, tmp_path):
        with pytest.raises(PassError, match="opset 15; rewrite-opset takes opset 17 and later"):
            imported(model("g (float[b,32] x) => (float[b,32] y) { y = Relu(x) }", opset=15, ir=8), tmp_path)

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
        check = ImportCheck(good)
        check(None, good, None)
        with pytest.raises(PassCheckError, match="changed output 'y'"):
            check(good, wrong, FoldConstants())
        assert "outputs within 0.0e+00" in ImportCheck(good)(good, good, FoldConstants())

    def test_a_pass_after_which_nothing_runs_is_caught(self, tmp_path):
        onnx.save(model(LINEAR, linear_values() | {"bias": np.ones(8, np.float16)}, 23), tmp_path / "in.onnx")
        good = read_model(tmp_path / "in.onnx").model
        wrong = onnx.ModelProto()
        wrong.CopyFrom(good)
        wrong.graph.node[-1].op_type = "Mod"  # of floats without fmod: ONNX Runtime refuses
        with pytest.raises(
            PassCheckError, match="ONNX Runtime ran the graph before it; after it, it did not run"
        ):
            ImportCheck(good)(good, wrong, FoldConstants())


def test_large_weights_are_never_read_while_importing(tmp_path, monkeypatch):
    values = linear_values() | {"w": RNG.standard_normal((8, 4096)).astype(np.float16)}
    onnx.save(
        model(LINEAR.replace("b,32", "b,4096"), values, 20),
        tmp_path / "in.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=1024,
    )
    monkeypatch.setattr("diffc.importing.NUMERIC_LIMIT", 1)
    monkeypatch.setattr("passes.sources.np.memmap", lambda *_: pytest.fail("the weights were read"))
    result = import_model(tmp_path / "in.onnx")
    assert weight_bytes(result) < 0.6 * values["w"].nbytes
    monkeypatch.undo()
    save(result, tmp_path / "out.onnx")
    x = RNG.standard_normal((3, 4096)).astype(np.float16)
    assert rel_l2(outputs(load(tmp_path / "out.onnx"), {"x": x}), linear_by_hand(x, values)) < 1e-3
