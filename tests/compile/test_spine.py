"""Whole compiles of every embedded model to every format: what they leave, and that it computes the same."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from diffc.artifact.folder import RUN
from diffc.commands.validate import ValidateRequest, validate_artifact
from diffc.compile.spine import compile_model
from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import EMBEDDED
from diffc.models.inputs import random_inputs
from diffc.models.sources.backbone import DTYPES, load_backbone
from diffc.models.spec import Shape
from diffc.quantize.convert import layer_of, role_of
from diffc.validate.reports import UNROUNDED
from tests import polygraphy_cli
from tests.conftest import CELLS, HAS_RTX, PROMPTS, Cell, Cells, small_request

NARROW = (
    onnx.TensorProto.INT8,
    onnx.TensorProto.INT4,
    onnx.TensorProto.FLOAT8E4M3FN,
    onnx.TensorProto.FLOAT4E2M1,
    onnx.TensorProto.UINT8,
)
STORED_AS = {
    "int8": onnx.TensorProto.INT8,
    "int8_smoothquant": onnx.TensorProto.INT8,
    "fp8": onnx.TensorProto.FLOAT8E4M3FN,
    "int4_awq": onnx.TensorProto.INT4,
    "w4a8_awq": onnx.TensorProto.INT4,
    "nvfp4": onnx.TensorProto.FLOAT4E2M1,
    "nvfp4_svdquant": onnx.TensorProto.FLOAT4E2M1,
    "mxfp8": onnx.TensorProto.FLOAT8E4M3FN,
}
BLOCK_SCALES = {
    "nvfp4": (onnx.TensorProto.FLOAT8E4M3FN, 16),
    "nvfp4_svdquant": (onnx.TensorProto.FLOAT8E4M3FN, 16),
    "mxfp8": (onnx.TensorProto.UINT8, 32),
}
"""Formats whose block scales are stored in a narrow type, too -> that type, and elements of a block."""
BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.FLOAT4E2M1: 4}
QUANTIZERS = ("QuantizeLinear", "TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize")

TINY = [name for name in EMBEDDED if name.startswith("tiny-")]

# One of each: no quantizers, FP8, FP4 blocks (SD3); bfloat16, joint blocks and rotary positions (FLUX); convolutions
# (SDXL). Everything else is slow: `pytest -m slow tests/compile/test_spine.py` walks the
# rest of the product, and tools/pages/matrix.py all of it, with more types. A cell takes half a minute.
QUICK = {
    *(("tiny-sd3", cell) for cell in ("none", "fp8", "nvfp4")),
    ("tiny-flux", "int8"),
    ("tiny-sdxl", "fp8"),
}
PRODUCT = [
    pytest.param(
        (model, cell),
        # A group of its own: the cells are spread over the test processes.
        marks=[
            pytest.mark.xdist_group(f"{model}-{cell}"),
            *([] if (model, cell) in QUICK else [pytest.mark.slow]),
        ],
        id=f"{model}-{cell}",
    )
    for model in TINY
    for cell in CELLS
]


@pytest.fixture(params=PRODUCT, scope="module")
def cell(request: pytest.FixtureRequest, compiled: Cells) -> Cell:
    """Each cell in turn."""
    return compiled(*request.param)


def quantized_layers(cell: Cell) -> list[str]:
    """Module paths whose weights the checkpoint quantizes."""
    settings = cell.checkpoint.settings if cell.checkpoint else {}
    return list(dict.fromkeys(layer_of(name) for name in settings if role_of(name) == "weight_quantizer"))


def initializers(cell: Cell) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in cell.model.graph.initializer}


def bytes_of(tensor: onnx.TensorProto) -> int:
    """What the tensor takes, from its type and shape."""
    width = BITS.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return (int(np.prod(tensor.dims)) * width + 7) // 8


def test_onnx_runtime_opens_and_runs_it_with_its_default_options(cell: Cell) -> None:
    """As `polygraphy run` and a session without options do; diffc's own sessions switch some rewrites off."""
    import onnxruntime

    if cell.plan.dtype == "bfloat16":
        pytest.skip("ONNX Runtime's CPU provider has no bfloat16")
    path = cell.folder / cell.artifact.manifest["targets"]["ort"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shape, types = Shape(2, 64, 64, 24), DTYPES[cell.plan.dtype]
    inputs = random_inputs(cell.plan.source.family, cell.plan.source.config, shape, dtype=types, seed=4)
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    assert np.isfinite(found).all()


def test_polygraphy_repeats_the_validation_within_the_limits_that_are_written_beside_it(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cell.folder / "validation"
    if cell.plan.dtype == "bfloat16":
        assert not (folder / "run.sh").exists()  # ONNX Runtime has no kernels for it on the CPU
    else:
        commands = polygraphy_cli.lines(folder / "run.sh")
        assert len(commands) == 2
        assert not any("--graph-optimization-level" in command for command in commands)
        for command in commands:
            assert polygraphy_cli.status(command, folder, monkeypatch) == 0
    if HAS_RTX:
        commands = polygraphy_cli.lines(folder / "rtx.sh")
        assert {command[1] for command in commands} == {
            f"../{engine['file']}" for engine in cell.artifact.manifest["engines"]
        }
        assert all((folder / command[1]).is_file() for command in commands)
        assert b"\r\n" in (folder / "rtx.bat").read_bytes()


def test_one_engine_for_each_gpu_with_the_weights_in_it(cell: Cell) -> None:
    pytest.importorskip("tensorrt_rtx")
    sms = cell.request.sms
    assert min(sms) == FIRST_SM.get(cell.request.format, 86)
    weights = sum(bytes_of(t) for t in initializers(cell).values() if t.data_type in NARROW)
    if cell.request.format == "none":
        weights = sum(bytes_of(t) for t in initializers(cell).values() if len(t.dims) > 1) // 2
    assert weights > (500_000 if STORED_AS.get(cell.request.format) not in BITS else 250_000)
    assert [report.sms for report in cell.result.engines] == [(sm,) for sm in sms]
    for sm in sms:
        assert (cell.folder / "engines" / f"trt-rtx-sm{sm}.engine").stat().st_size >= weights


FIRST_SM = {"fp8": 89, "w4a8_awq": 89, "mxfp8": 89, "nvfp4": 120, "nvfp4_svdquant": 120}


def test_quantized_weights_are_stored_in_their_bits_and_only_so(cell: Cell) -> None:
    tensors, layers = initializers(cell), quantized_layers(cell)
    matrices = {n for n, t in tensors.items() if t.data_type in NARROW and len(t.dims) in (2, 4)}
    wanted = {f"{layer}.weight_q" for layer in layers}
    if cell.request.format in BLOCK_SCALES:
        wanted |= {f"{layer}.weight_scale" for layer in layers}
    assert matrices == wanted
    assert bool(layers) == (cell.request.format != "none")
    for layer in layers:
        stored, original = tensors[f"{layer}.weight_q"], cell.plan.source.weights[f"{layer}.weight"]
        assert stored.data_type == STORED_AS[cell.request.format]
        assert f"{layer}.weight" not in tensors
        assert np.prod(stored.dims) == np.prod(original.shape)
        assert len(stored.raw_data) == bytes_of(stored)
        if cell.request.format in BLOCK_SCALES:
            kind, size = BLOCK_SCALES[cell.request.format]
            scales = tensors[f"{layer}.weight_scale"]
            assert (scales.data_type, np.prod(scales.dims)) == (kind, np.prod(stored.dims) // size)


def test_weights_take_their_own_width_on_disk(cell: Cell) -> None:
    """The file is no larger than its tensors at their own widths, and page alignment of each; models share it."""
    places: dict[str, int] = {}
    for path in cell.folder.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {e.key: e.value for e in tensor.external_data}
                assert place["location"] == "model.onnx_data"
                assert int(place["length"]) == bytes_of(tensor)
                places[place["offset"]] = bytes_of(tensor)
    size = (cell.folder / "model.onnx_data").stat().st_size
    assert 250_000 < sum(places.values()) <= size <= sum(places.values()) + 4096 * len(places)


def test_no_weight_is_quantized_in_the_graph(cell: Cell) -> None:
    """But for the second quantization of W4A8, from INT4 to FP8, which is a kernel's work."""
    tensors = initializers(cell)
    constants = set(tensors) | {o for n in cell.model.graph.node if n.op_type == "Constant" for o in n.output}
    quantize = [n for n in cell.model.graph.node if n.op_type in QUANTIZERS]
    assert not [n.name for n in quantize if n.input[0] in constants]
    found = {n.name.partition("/")[0] for n in quantize}
    settings = cell.checkpoint.settings if cell.checkpoint else {}
    activations = {n for n in settings if role_of(n) != "weight_quantizer"}
    assert {n for n in found if role_of(n) == "weight_quantizer"} == {n for n in settings if n[-2:] == ".1"}
    attention = {layer_of(n) for n in settings if role_of(n) == "q_bmm_quantizer"}
    assert bool(attention) == cell.request.options.quantizes_attention
    assert {n for n in found if role_of(n) != "weight_quantizer"} <= activations | attention
    assert bool(found) == (bool(activations) or cell.request.format == "w4a8_awq")


def test_every_quantized_layer_takes_quantized_inputs(cell: Cell) -> None:
    """As its format says; equal quantizers of one tensor may be one node, and data may move behind it."""
    producers = {o: n for n in cell.model.graph.node for o in n.output}
    settings = cell.checkpoint.settings if cell.checkpoint else {}
    found = {}
    for node in cell.model.graph.node:
        layer, _, rest = node.name.partition("/")
        if node.op_type in ("MatMul", "Gemm", "Conv") and rest.partition("_")[0] == node.op_type:
            sources = [ancestor(producers, name) for name in node.input[:2]]
            if sources[1] is not None and f"{layer}.weight" in " ".join([*sources[1].input, sources[1].name]):
                found[layer] = sources[0] is not None
    layers = quantized_layers(cell)
    assert found.keys() >= set(layers)
    assert {layer for layer in layers if found[layer]} == {
        layer for layer in layers if f"{layer}.input_quantizer" in settings
    }


def ancestor(producers: dict[str, onnx.NodeProto], name: str) -> onnx.NodeProto | None:
    """The dequantizer that a tensor comes from through nothing but movement of data."""
    while name in producers:
        node = producers[name]
        if node.op_type in ("DequantizeLinear", "TRT_MXFP8DequantizeLinear"):
            return node
        if node.op_type not in MOVEMENT:
            return None
        name = node.input[0]
    return None


MOVEMENT = ("Cast", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Split", "Concat", "Identity")


def test_validation_passed_at_two_different_shapes(cell: Cell) -> None:
    reports = cell.result.validation
    shapes = {report.shape for report in reports}
    assert len(shapes) == 2
    for axis in ("batch", "height", "width", "text"):
        assert len({getattr(shape, axis) for shape in shapes}) == 2, axis
    for report in reports:
        assert report.rows
        for row in report.rows:
            assert row.passed
            assert row.rel_l2 is not None
            limit = 5e-2 if cell.plan.format.input_bits == 4 else 2e-2
            assert row.rel_l2 <= row.tolerance <= limit  # 0 where FP8 sums are exact
    recorded = [(v["shape"], v["arithmetic"]) for v in cell.artifact.manifest["validation"]]
    assert recorded == [(report.shape.described(), report.arithmetic) for report in reports]
    assert len(list((cell.folder / "validation").glob("*-inputs.json"))) == len(reports)


def test_manifest_lists_every_file_with_its_hash(cell: Cell) -> None:
    files = cell.artifact.manifest["files"]
    found = {p.relative_to(cell.folder).as_posix() for p in cell.folder.rglob("*") if p.is_file()}
    assert found == {*files, "manifest.json", RUN}
    for name, entry in files.items():
        content = (cell.folder / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry["sha256"], entry["bytes"]), name
    cell.artifact.verify()


def test_inputs_and_outputs_are_those_of_the_spec(cell: Cell) -> None:
    spec, config = cell.plan.source.family, cell.plan.source.config
    element = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[cell.plan.dtype]
    wanted = [
        (i.name, element if i.dtype == "model" else onnx.TensorProto.FLOAT, list(i.dims))
        for i in spec.inputs(config)
    ]
    assert [described(v) for v in cell.model.graph.input] == wanted
    output = (spec.output, element, list(spec.output_dims(config)))
    assert [described(v) for v in cell.model.graph.output] == [output]
    listed = [
        (v["name"], onnx.TensorProto.DataType.Value(v["dtype"]), v["dims"])
        for v in cell.artifact.manifest["inputs"]
    ]
    assert listed == wanted


def described(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]


def test_model_is_valid_and_nodes_are_named_by_module(cell: Cell) -> None:
    model = cell.model
    trt = [("trt", 1)] if cell.request.format in BLOCK_SCALES else []
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 23), *trt]
    assert model.ir_version == 11
    for path in cell.folder.glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    modules = {name for name, _ in load_backbone(cell.plan.source, torch.float32).named_modules()}
    quantizers = set(cell.checkpoint.settings) if cell.checkpoint else set()
    if cell.checkpoint:  # an input that is scaled, and not quantized
        quantizers |= {name.rpartition(".")[0] for name in cell.checkpoint.scaling}
    paths = [name.rpartition("/")[0] for name in names]
    strange = {path for path in paths if path and path.partition("/")[0] not in modules | quantizers}
    assert not strange
    assert sum(1 for path in paths if path) > 0.9 * len(paths)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("tiny-sd3", "none"),
        ("tiny-sdxl", "fp8"),
        ("tiny-flux", "int8"),
        pytest.param("tiny-sd35", "fp8", marks=pytest.mark.slow),
    ],
)
def test_every_size_is_dynamic(name: str, format: str, compiled: Cells) -> None:
    """Far from the shape of the trace and from those of validation; batch 1 and one token as well."""
    cell = compiled(name, format)
    step = cell.plan.source.family.pixel_multiple(cell.plan.source.config)
    shapes = (
        f"batch=3,height={3 * step},width={10 * step},text=33",
        f"batch=1,height={7 * step},width={2 * step},text=1",
    )
    found = validate_artifact(ValidateRequest(cell.folder, shapes=shapes, seeds=(40,)))
    assert len({report.shape for report in found.reports}) == len(shapes)
    assert all(report.passed for report in found.reports), found.reports
    arithmetics = {report.arithmetic for report in found.reports}
    assert (UNROUNDED if cell.plan.rounds_activations else "float32") in arithmetics


@pytest.mark.parametrize(
    ("format", "dtype", "sm"),
    [
        pytest.param("fp8", "float32", 89, marks=pytest.mark.slow),  # in the first lane: test_fixed_batch
        pytest.param("fp8", "bfloat16", 120, marks=pytest.mark.slow),  # in the first lane: tiny-flux
        pytest.param("nvfp4", "float32", 120, marks=pytest.mark.slow),
        pytest.param("mxfp8", "bfloat16", 120, marks=pytest.mark.slow),
        pytest.param("w4a8_awq", "bfloat16", 89, marks=pytest.mark.slow),
    ],
)
def test_other_compute_types(format: str, dtype: str, sm: int, compiled: Cells) -> None:
    cell = compiled("tiny-sd3", format, **{"dtype": dtype} | ({"sms": (sm,)} if HAS_RTX else {}))
    element = {"float32": onnx.TensorProto.FLOAT, "bfloat16": onnx.TensorProto.BFLOAT16}[dtype]
    assert {t.data_type for t in cell.model.graph.initializer if t.name.endswith("norm_out.linear.bias")} == {
        element
    }
    assert cell.model.graph.input[0].type.tensor_type.elem_type == element
    attention = [n for n in cell.model.graph.node if n.op_type == "Attention"]
    if cell.request.sms:
        assert [report.sms for report in cell.result.engines] == [(sm,)]
        assert bool(attention) == (dtype != "float32")  # trt-rtx has no float32 attention kernel
    assert all(row.passed for report in cell.result.validation for row in report.rows)


def graph_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("model.onnx", "model.onnx_data")}


def test_two_compiles_are_byte_identical(compiled: Cells, tmp_path: Path) -> None:
    """The second in a process of its own, where strings hash otherwise."""
    name, format = "tiny-sd3", "fp8"
    cell = compiled(name, format)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    command = [sys.executable, "-m", "diffc", "compile", name, "--format", format, "-o"]
    command += [str(tmp_path / "again"), "--prompts-file", str(prompts), "--steps", "2", "--image-size", "64"]
    if cell.request.sms:
        command += ["--target", "trt-rtx", "--target", "ort", "--sm", "89"]
    environment = os.environ | {"PYTHONHASHSEED": "4242"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert graph_files(tmp_path / "again") == graph_files(cell.folder)
    again = (tmp_path / "again" / "checkpoint" / "quantizers.safetensors").read_bytes()
    assert again == (cell.folder / "checkpoint" / "quantizers.safetensors").read_bytes()


@pytest.mark.slow
def test_a_checkpoint_gives_the_same_weights_without_the_pipeline(compiled: Cells, tmp_path: Path) -> None:
    """From the backbone's folder alone, whose name is another."""
    cell = compiled("tiny-flux", "int8")
    request = small_request(
        str(cell.plan.source.path),
        "int8",
        tmp_path / "out",
        targets=("ort",),
        sms=(),
        from_checkpoint=cell.folder / "checkpoint",
        prompts=None,
    )
    result = compile_model(request)
    assert (tmp_path / "out" / "model.onnx_data").read_bytes() == (
        cell.folder / "model.onnx_data"
    ).read_bytes()
    assert result.artifact.manifest["model"]["family"] == "flux"


def test_a_checkpoint_of_another_model_is_refused(compiled: Cells, tmp_path: Path) -> None:
    checkpoint = compiled("tiny-sd3", "fp8").folder / "checkpoint"
    for name, message in (("tiny-sd35", "of another sd3 model"), ("tiny-flux", "of family 'sd3'")):
        request = small_request(name, "fp8", tmp_path / "out", from_checkpoint=checkpoint)
        with pytest.raises(DiffcError, match=message):
            compile_model(request)
    request = small_request("tiny-sd3", "int8", tmp_path / "out", from_checkpoint=checkpoint)
    with pytest.raises(DiffcError, match=r"calibrated for fp8, and int8 is asked for[\s\S]*--format fp8"):
        compile_model(request)
    assert not list(tmp_path.iterdir())
