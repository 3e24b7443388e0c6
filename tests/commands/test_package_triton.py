"""`diffc package --layout triton`: config.pbtxt against the server's published schema, and the model that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from diffc.artifact.folder import Artifact, write_manifest
from diffc.backends.profile import Profile
from diffc.backends.signature import Signature, Value
from diffc.cli.main import run
from diffc.commands.package.pbtxt import Word, message_text
from diffc.commands.package.request import PackageRequest
from diffc.commands.package.run import package
from diffc.commands.package.triton import BACKENDS, model_name
from diffc.commands.package.triton_config import TYPES, ModelConfig
from diffc.errors import DiffcError
from tests.conftest import Cells
from tests.runtime.test_load import SMALL

X = Value("x", "FLOAT16", ("batch", 16, "height", "width"))
TIME = Value("time", "FLOAT", ("batch",))
OUT = Value("out", "FLOAT16", ("batch", 16, "height", "width"))
SIZES = [{"batch": n, "height": n * 8, "width": 16, "tokens": 9} for n in (1, 2, 4)]


def config(*inputs: Value, target: str = "ort-cuda") -> Any:
    """The message that the server reads of a model with these inputs."""
    profile = Profile.of_dims({v.name: v.dims for v in inputs}, *SIZES)
    made = ModelConfig("a.b", BACKENDS[target], Signature(inputs, (OUT,)), profile)
    return read(made.text())


def read(text: str) -> Any:
    """A config.pbtxt by the server's schema; a field or name that it does not have raises."""
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def tensors(message: Any) -> dict[str, tuple[str, list[int], bool]]:
    """Type, dims and whether there is an empty reshape, by name."""
    names = model_config_pb2.DataType.Name
    return {
        t.name: (names(t.data_type), list(t.dims), t.HasField("reshape") and not t.reshape.shape)
        for t in (*message.input, *message.output)
    }


def test_a_batch_that_all_share_is_left_out_of_dims() -> None:
    found = config(X, TIME)
    assert (found.max_batch_size, found.dynamic_batching.max_queue_delay_microseconds) == (4, 2000)
    assert tensors(found) == {
        "x": ("TYPE_FP16", [16, -1, -1], False),
        "time": ("TYPE_FP32", [1], True),
        "out": ("TYPE_FP16", [16, -1, -1], False),
    }
    (warm,) = found.model_warmup
    assert (warm.batch_size, list(warm.inputs["x"].dims), list(warm.inputs["time"].dims)) == (
        2,
        [16, 16, 16],
        [1],
    )
    assert all(given.zero_data for given in warm.inputs.values())


@pytest.mark.parametrize(
    "other",
    [
        Value("ids", "INT64", ("tokens", 3)),
        Value("scalar", "FLOAT", ()),
        Value("one", "FLOAT", (1, 6)),
        Value("pairs", "FLOAT", ("batch", "batch")),
    ],
    ids=lambda value: value.name,
)
def test_without_a_shared_batch_dims_are_whole_shapes(other: Value) -> None:
    found = config(X, other)
    assert (found.max_batch_size, found.HasField("dynamic_batching")) == (0, False)
    dims = [d if isinstance(d, int) else -1 for d in other.dims] or [1]
    assert tensors(found)["x"] == ("TYPE_FP16", [-1, 16, -1, -1], False)
    assert tensors(found)[other.name] == (TYPES[other.dtype], dims, False)
    (warm,) = found.model_warmup
    assert (warm.batch_size, list(warm.inputs["x"].dims)) == (1, [2, 16, 16, 16])


def test_every_type_of_a_graph_has_one_of_the_server() -> None:
    values = [Value(f"v{n}", dtype, ("batch", n)) for n, dtype in enumerate(TYPES)]
    assert [kind for kind, _, _ in tensors(config(*values)).values()][:-1] == list(TYPES.values())


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("tensorrt", ("tensorrt_plan", "model.plan", "KIND_GPU", True)),
        ("ort-cuda", ("onnxruntime_onnx", "model.onnx", "KIND_GPU", True)),
        ("ort", ("onnxruntime_onnx", "model.onnx", "KIND_CPU", False)),
    ],
)
def test_each_target_has_its_backend(target: str, found: tuple[Any, ...]) -> None:
    made = config(X, target=target)
    (group,) = made.instance_group
    kind = model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind)
    pinned = made.optimization.input_pinned_memory.enable
    assert (made.platform, made.default_model_filename, kind, pinned) == found
    assert made.name == "a.b"


def test_text_is_quoted_and_words_are_not() -> None:
    text = message_text({"a": 'say "\n\\é', "b": Word("KIND"), "c": [{"d": True}, {"d": [1, 2]}], "e": []})
    assert text == 'a: "say \\"\\n\\\\\\u00e9"\nb: KIND\nc {\n  d: true\n}\nc {\n  d: [1, 2]\n}\ne: []\n'


def by_hand(folder: Path, **changed: Any) -> Path:
    """An artifact with an engine of TensorRT (a file of some bytes), whose inputs share their batch."""
    (folder / "engines").mkdir(parents=True)
    (folder / "engines" / "tensorrt.engine").write_bytes(b"the engine")
    (folder / "model.onnx").write_bytes(b"the graph")
    values = [{"name": v.name, "dtype": v.dtype, "dims": list(v.dims)} for v in (X, TIME, OUT)]
    ranges = {"x": [[1, 16, 8, 16], [1, 16, 8, 16], [3, 16, 9, 16]], "time": [[1], [1], [3]]}
    engine = {"file": "engines/tensorrt.engine", "target": "tensorrt", "version": "11.4.0.106", "sms": []}
    content = {
        "model": {"name": "my model.onnx"},
        "format": "as imported",
        "targets": {"tensorrt": "model.onnx"},
        "inputs": values[:2],
        "outputs": values[2:],
        "profile": [{"inputs": ranges}],
        "engines": [engine],
    }
    write_manifest(folder, content | changed, {})
    return folder


def test_an_engine_of_tensorrt_is_a_plan(tmp_path: Path) -> None:
    made = package(PackageRequest(by_hand(tmp_path / "artifact"), tmp_path / "repository", "triton"))
    model = tmp_path / "repository" / "my_model.onnx"
    assert (model / "1" / "model.plan").read_bytes() == b"the engine"
    found = read((model / "config.pbtxt").read_text())
    assert (found.name, found.max_batch_size, found.backend) == ("my_model.onnx", 3, "tensorrt")
    assert any("TensorRT must be 11.4.0.106" in note for note in made.notes)


def test_what_the_server_does_not_run_is_refused(tmp_path: Path) -> None:
    artifact = by_hand(tmp_path / "artifact")
    rtx = by_hand(tmp_path / "rtx", targets={"trt-rtx": "model.onnx"}, engines=[])
    bare = {
        "file": "engines/tensorrt.engine",
        "target": "tensorrt",
        "version": "11",
        "sms": [],
        "weights": "model.onnx",
    }
    half = by_hand(tmp_path / "half", engines=[bare])
    number = [{"name": "time", "dtype": "FLOAT", "dims": []}]
    scalar = by_hand(tmp_path / "scalar", inputs=number, profile=[{"inputs": {"time": [[], [], []]}}])
    wide = by_hand(tmp_path / "wide", targets={"ort": "model.onnx"}, engines=[], dtype="bfloat16")
    cases: list[tuple[Path, str | None, str]] = [
        (rtx, None, "those of TensorRT-RTX are of another library"),
        (artifact, "ort-trt-rtx", "no TensorRT-RTX provider"),
        (artifact, "ort", "was compiled for tensorrt"),
        (artifact, "cuda", "unknown target 'cuda'"),
        (half, None, "built without its weights"),
        (scalar, None, "time has no dimensions"),
        (wide, None, "computes in bfloat16"),
    ]
    for source, target, match in cases:
        with pytest.raises(DiffcError, match=match):
            package(PackageRequest(source, tmp_path / "out", "triton", target=target))
    assert not (tmp_path / "out").exists()


def test_names_have_no_characters_of_paths() -> None:
    for name, found in {"a/b c": "a_b_c", "../x": "x", "ä": "model"}.items():
        assert model_name(Artifact(Path(), {"model": {"name": name}})) == found


def test_the_model_computes_what_the_artifact_does(compiled: Cells, tmp_path: Path) -> None:
    """As the server opens it: default options, from the folder of its version, batched as the configuration says."""
    import onnxruntime as ort

    import diffc

    artifact = compiled("digits-sd3", "none", **SMALL).folder
    assert run(["package", str(artifact), "--layout", "triton", "-o", str(tmp_path / "repository")]) == 0
    model = tmp_path / "repository" / "digits-sd3"
    found = read((model / "config.pbtxt").read_text())
    assert found.max_batch_size > 1
    rng, size = np.random.default_rng(3), {-1: 8}
    one = {
        t.name: rng.standard_normal([size.get(d, d) for d in t.dims], dtype=np.float32) for t in found.input
    }
    feed = {
        t.name: np.stack([one[t.name]] * 2).reshape(
            (2, *(t.reshape.shape if t.HasField("reshape") else one[t.name].shape))
        )
        for t in found.input
    }
    served = ort.InferenceSession(str(model / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    (got,) = served.run([found.output[0].name], feed)
    with diffc.session(artifact) as session:
        want = session.run(feed)[found.output[0].name]
    assert got.shape[1:] == tuple(size.get(d, d) for d in found.output[0].dims)
    assert np.allclose(got, want, atol=1e-5)
    assert want.std() > 0
