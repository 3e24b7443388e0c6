"""Which engine, profile and file of an artifact is taken, and what is said where none fits. No GPU is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

import diffc
from diffc.backends.onnxruntime.open import profile_text
from diffc.backends.onnxruntime.run import options_for
from diffc.backends.profile import Profile
from diffc.backends.signature import Signature, Value, pick_profile
from diffc.backends.target import TARGETS
from diffc.backends.tensorrt.epcontext import write_context
from diffc.backends.tensorrt.run import deserialize, pick_engine
from diffc.errors import DiffcError
from tests.conftest import HAS_RTX, Cells

SMALL = {"targets": ("ort",), "sms": (), "dtype": "float32", "skip_validation": True}
NARROW = Profile.of_shapes({"x": (1, 8)}, {"x": (2, 8)}, {"x": (4, 8)})
WIDE = Profile.of_shapes({"x": (1, 8)}, {"x": (8, 8)}, {"x": (16, 64)})
ENGINES: list[dict[str, Any]] = [
    {"file": "engines/a.engine", "target": "trt-rtx", "sms": [89]},
    {"file": "engines/b.engine", "target": "trt-rtx", "sms": [120]},
    {"file": "engines/c.engine", "target": "tensorrt", "sms": []},
]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")


@pytest.fixture
def artifact(compiled: Cells, tmp_path: Path) -> Path:
    folder = compiled("digits-sd3", "none", **SMALL).folder
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(artifact: Path, **changed: Any) -> None:
    path = artifact / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_the_nearest_profile_that_fits_is_taken() -> None:
    assert pick_profile([NARROW, WIDE], {"x": (2, 8)}) == 0
    assert pick_profile([NARROW, WIDE], {"x": (4, 8)}) == 0
    assert pick_profile([WIDE, NARROW], {"x": (2, 8)}) == 1
    assert pick_profile([NARROW, WIDE], {"x": (4, 16)}) == 1
    with pytest.raises(
        DiffcError, match=r"profile 0: \[1, 8\] to \[4, 8\]; profile 1: \[1, 8\] to \[16, 64\]"
    ):
        pick_profile([NARROW, WIDE], {"x": (17, 8)})


def test_a_shape_outside_the_profile_is_refused_before_the_run() -> None:
    value = Value("x", "FLOAT", ("n", "k"))
    assert Signature((value,), (value,), (), (NARROW,)).check({"x": (3, 8)}) == {"n": 3, "k": 8}
    assert Signature((value,), (value,)).check({"x": (3, 9)}) == {"n": 3, "k": 9}
    with pytest.raises(DiffcError, match="wider --profile"):
        Signature((value,), (value,), (), (NARROW,)).check({"x": (3, 9)})
    with pytest.raises(DiffcError, match="x has shape"):
        Signature((value,), (value,)).check({"x": (0, 9)})


def test_the_engine_of_the_gpu_is_taken() -> None:
    assert pick_engine(ENGINES, "trt-rtx", 120)["file"] == "engines/b.engine"
    assert pick_engine(ENGINES, "tensorrt", 90)["file"] == "engines/c.engine"
    with pytest.raises(DiffcError, match="SM90, and the artifact's trt-rtx engines are for: SM89, SM120"):
        pick_engine(ENGINES, "trt-rtx", 90)


def test_profiles_are_told_to_onnx_runtime_without_scalars() -> None:
    profile = Profile.of_shapes({"x": (1, 8), "t": ()}, {"x": (2, 8), "t": ()}, {"x": (4, 8), "t": ()})
    assert profile_text(profile, "max") == "x:4x8"


def test_the_artifact_is_checked_first(artifact: Path) -> None:
    assert diffc.load(artifact, verify=True).target == "ort"
    for change, message in (
        ({"targets": {"ort": "../model.onnx"}}, "outside the artifact"),
        ({"targets": {"ort": "/etc/model.onnx"}}, "outside the artifact"),
        ({"targets": {"ort": "other.onnx"}}, "lists no other.onnx"),
        ({"schema": 99}, "schema 99"),
        ({"model": {"name": "x.onnx"}}, "those of no family that diffc knows"),
    ):
        before = (artifact / "manifest.json").read_text()
        edit(artifact, **change)
        with pytest.raises(DiffcError, match=message):
            diffc.load(artifact)
        (artifact / "manifest.json").write_text(before)
    data = bytearray((artifact / "model.onnx_data").read_bytes())
    data[100] ^= 1
    (artifact / "model.onnx_data").write_bytes(data)
    diffc.load(artifact)
    with pytest.raises(DiffcError, match="was changed after the compile"):
        diffc.load(artifact, verify=True)


@no_gpu
def test_targets_that_do_not_run_here_are_never_replaced(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    targets = dict.fromkeys(("ort", "trt-rtx", "ort-cuda", "ort-trt-rtx", "tensorrt"), "model.onnx")
    edit(artifact, targets=targets, engines=[e | {"file": "model.onnx", "version": "1.7"} for e in ENGINES])
    assert diffc.load(artifact).target == "ort"
    for target, message in (
        ("trt-rtx", "no CUDA device"),
        ("ort-cuda", "no CUDAExecutionProvider"),
        ("ort-tensorrt", "no TensorrtExecutionProvider"),
        ("ort-trt-rtx", "is not installed"),
        ("turbo", "unknown runtime target 'turbo'"),
    ):
        with pytest.raises(DiffcError, match=message):
            diffc.load(artifact, target=target)
    edit(artifact, dtype="bfloat16")
    with pytest.raises(DiffcError, match="CPU kernels have no bfloat16"):
        diffc.load(artifact, target="ort")
    edit(artifact, dtype="float32")
    with pytest.raises(DiffcError, match="ort: it does not run on cuda:0"):
        diffc.load(artifact, device="cuda")
    edit(artifact, **manifest)
    with pytest.raises(DiffcError, match="compile again with --target ort-cuda"):
        diffc.load(artifact, target="ort-cuda")


def _engine(file: Path) -> Any:
    """A TensorRT-RTX engine for SM89 of x -> relu(x), in `file`; the module that built it."""
    import tensorrt_rtx as trt

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    x = network.add_input("x", trt.float16, (4, 4))
    network.mark_output(network.add_activation(x, trt.ActivationType.RELU).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    file.write_bytes(bytes(builder.build_serialized_network(network, config)))
    return trt


@no_gpu
@pytest.mark.skipif(not HAS_RTX, reason="needs the TensorRT-RTX builder")
def test_an_engine_that_does_not_load_says_why(tmp_path: Path) -> None:
    file = tmp_path / "a.engine"
    trt = _engine(file)
    with pytest.raises(DiffcError, match=r"tensorrt_rtx 1\.\S+ does not load .*a\.engine: \S+"):
        deserialize(trt, file)


@pytest.mark.skipif(not HAS_RTX, reason="needs TensorRT-RTX")
def test_what_refitting_calls_is_there() -> None:
    import tensorrt_rtx as trt

    assert callable(trt.Refitter.refit_cuda_engine)
    assert callable(trt.Refitter.get_missing_weights)
    assert callable(trt.OnnxParserRefitter.refit_from_file)
    assert callable(trt.OnnxParserRefitter.get_error)


def test_an_engine_is_wrapped_for_onnx_runtime(artifact: Path) -> None:
    import onnxruntime as ort

    engine = artifact / "a.engine"
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    with pytest.raises(DiffcError, match="no such engine"):
        write_context(model, engine, version="1.7.1", sm=89)
    engine.write_bytes(b"an engine")
    path = write_context(model, engine, version="1.7.1", sm=89)
    wrapped = onnx.load(path)
    onnx.checker.check_model(wrapped)
    (node,) = wrapped.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["ep_cache_context"] == b"a.engine"
    assert (attributes["embed_mode"], attributes["hardware_architecture"]) == (0, b"89")
    assert [v.name for v in wrapped.graph.input] == [v.name for v in model.graph.input]
    # ONNX Runtime knows the operator and takes its attributes; what it lacks here is the provider.
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*EPContext"):
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    next(a for a in node.attribute if a.name == "embed_mode").CopyFrom(
        onnx.helper.make_attribute("embed_mode", "text")
    )
    with pytest.raises(Exception, match="INVALID_GRAPH"):
        ort.InferenceSession(wrapped.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("target", "types", "basic"),
    [
        ("ort-cuda", {TensorProto.FLOAT16, TensorProto.INT64}, True),
        ("ort-cuda", {TensorProto.FLOAT16, TensorProto.INT8}, False),
        ("ort", {TensorProto.FLOAT16}, False),
    ],
)
def test_what_a_session_may_optimize(target: str, types: set[int], basic: bool) -> None:
    levels = ort.GraphOptimizationLevel
    wanted = levels.ORT_ENABLE_BASIC if basic else levels.ORT_ENABLE_ALL
    assert options_for(TARGETS[target], types).graph_optimization_level == wanted
