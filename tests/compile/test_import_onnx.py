"""ModelOpt's own exports, through the import, against the outputs that its torch models recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffc.backends.tensorrt.build import EngineRequest, build_engine
from diffc.cli.main import run
from diffc.compile.import_check import marks
from diffc.compile.import_onnx import import_result
from diffc.validate.float32 import cpu_session, feed, float32_copy
from passes.graph.check import check_structure
from passes.graph.inference import infer_types
from passes.storage import materialize, save
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe
from tests import ROOT
from tests.networks import rel_l2

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
    twin = float32_copy(model)
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
            min(export.error(float32_copy(export.model)), export.error(rounded_twin(export.model)))
            < LIMITS[name]
        )

    @pytest.mark.parametrize("name", ["nvfp4", "svd"])
    def test_fp4_outputs_are_as_near_as_two_arithmetics_are(self, name, exports):
        """Half a step of E2M1 is up to a quarter of a value: float32 and bfloat16 runs of one graph lie 5 % apart."""
        export = exports(name)
        wide, narrow = export.run(float32_copy(export.model)), export.run(rounded_twin(export.model))
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
        assert export.error(float32_copy(damaged)) > 2 * LIMITS[name]

    def test_fp8_falls_short_by_what_the_export_rounded_off(self, exports):
        """ModelOpt's exporter writes FP8 scales in bfloat16, amax / 448 to 8 bits; the torch model has them in float32.

        The amax of a weight is in the file, and rounds to the scale that was written. That of an activation was a
        bfloat16 number, so that it is one of two at most. With those scales the same graph meets the limit.
        """
        export = exports("fp8")
        twin = float32_copy(export.model)
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

    def test_the_command_compares_every_pass_and_says_what_was_done(self, tmp_path, capsys):
        output = tmp_path / "out.onnx"
        assert run(["import", str(FIXTURES / "flux_fp8.onnx"), "-o", str(output)]) == 0
        shown, progress = capsys.readouterr()
        assert "inputs.1 is hidden_states" in progress
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
