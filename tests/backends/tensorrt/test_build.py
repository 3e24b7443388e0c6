"""Engines: the real TensorRT-RTX builder on small networks, and all that is refused before or by it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper, numpy_helper

from diffc.backends.profile import Profile
from diffc.backends.tensorrt.build import EngineRequest, build_engine, has_device
from diffc.errors import DiffcError, UnsupportedError
from tests.networks import (
    FP8,
    FP16,
    FP32,
    INT8,
    attention,
    build,
    left_behind,
    make,
    mixed_types,
    network,
    profile,
    request,
    value,
)


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


@pytest.mark.usefixtures("rtx")
class TestBuild:
    def test_fp16_engine_holds_the_weights_and_says_what_it_is(self, tmp_path):
        seen: list[tuple[str, int, int]] = []
        asked = request(tmp_path, network(), (120, 86, 89, 86))
        report = build_engine(asked, on_progress=lambda *event: seen.append(event))
        data = report.path.read_bytes()
        assert len(data) == report.nbytes > 2 * 256 * 256 * 2
        assert report.sms == (86, 89, 120)
        assert report.version.startswith("1.")
        assert report.seconds > 0
        assert report.peak_rss is None or 50e6 < report.peak_rss < 4e9
        assert left_behind(tmp_path) == {"m.engine", "m.log", *(p.name for p in report.dumps.values())}
        phases = dict.fromkeys(name for name, _, _ in seen)
        assert {"Parsing ONNX", "Building engine", "Writing engine"} <= phases.keys()
        assert all(0 <= done <= total for _, done, total in seen)
        assert seen[-1] == ("Writing engine", report.nbytes, report.nbytes)

    def test_the_network_dump_names_layers_types_and_shapes(self, tmp_path):
        report = build(tmp_path, network(INT8))
        dump = json.loads(report.dumps["network"].read_text())
        layers = {layer["name"]: layer for layer in dump["layers"]}
        assert len(dump["layers"]) == report.layers
        assert layers["linear1"]["type"] == "MATRIX_MULTIPLY"
        quantizer = layers["linear0/input_quantizer"]
        assert quantizer["type"] == "QUANTIZE"
        assert quantizer["outputs"][0]["precision"] == "INT8"
        assert dump["inputs"] == [{"name": "x", "precision": "HALF", "shape": [-1, 256]}]

    def test_rebuilding_is_byte_identical_and_other_weights_are_another_engine(self, tmp_path):
        first = build(tmp_path / "a", network(seed=1), (89, 120))
        again = build(tmp_path / "b", network(seed=1), (120, 89))
        other = build(tmp_path / "c", network(seed=2), (89, 120))
        assert first.path.read_bytes() == again.path.read_bytes()
        assert first.sha256 == again.sha256 != other.sha256
        assert first.nbytes == other.nbytes

    def test_int8_engines_hold_one_byte_per_weight(self, tmp_path):
        size = 1024
        options = {"profiles": (profile(size),)}
        wide = build(tmp_path / "fp16", network(size=size), (86,), **options)
        narrow = build(tmp_path / "int8", network(INT8, size=size), (86,), **options)
        weights = 2 * size * size
        assert 2 * weights <= wide.nbytes < 2.4 * weights
        assert weights <= narrow.nbytes < 1.4 * weights

    @pytest.mark.parametrize("sms", [(89,), (120,), (89, 120, 121)])
    def test_fp8_engines_hold_one_byte_per_weight(self, tmp_path, sms):
        size = 1024
        report = build(tmp_path, network(FP8, size=size), sms, profiles=(profile(size),))
        assert 2 * size * size <= report.nbytes < 4 * size * size

    def test_several_profiles_level_and_weight_streaming(self, tmp_path):
        profiles = (profile(high=2), profile(low=2, high=64))
        report = build(tmp_path, network(), profiles=profiles, optimization_level=5, weight_streaming=True)
        assert report.nbytes > 2 * 256 * 256 * 2

    def test_an_engine_without_weights_is_refused_before_it_is_built(self, tmp_path):
        if has_device():
            pytest.skip("this machine has a GPU")
        with pytest.raises(UnsupportedError, match="built with an NVIDIA driver at hand"):
            build(tmp_path, network(), strip_weights=True)
        assert not (tmp_path / "m.log").exists()

    def test_an_engine_is_replaced_only_by_a_whole_one(self, tmp_path):
        old = build(tmp_path, network(seed=1)).path.read_bytes()
        with pytest.raises(DiffcError):
            build(tmp_path, mixed_types(), profiles=(profile(64),))
        assert (tmp_path / "m.engine").read_bytes() == old
        assert build(tmp_path, network(seed=2)).path.read_bytes() != old


@pytest.mark.usefixtures("rtx")
def builders() -> list[psutil.Process]:
    """The builder processes of this one, which may have others: compiles of other tests."""
    return [p for p in psutil.Process().children() if "diffc.backends.tensorrt.worker" in p.cmdline()]


class TestRejected:
    def failure(self, tmp_path: Path, model: onnx.ModelProto, profiles=()) -> str:
        with pytest.raises(DiffcError) as caught:
            build(tmp_path, model, profiles=profiles)
        assert left_behind(tmp_path) == {"m.log"}
        return str(caught.value)

    def test_the_parser_on_mixed_types(self, tmp_path, capfd):
        text = self.failure(tmp_path, mixed_types(), (profile(64),))
        assert "node 'block.0/add' (Add): [INVALID_NODE]" in text
        assert "must have same input types" in text
        assert "Fix: the network is strongly typed: put a Cast" in text
        assert "cudaError" not in text
        captured = capfd.readouterr()
        assert captured.out + captured.err == ""
        assert "While parsing node" in (tmp_path / "m.log").read_text()

    def test_the_parser_on_operators_it_does_not_have(self, tmp_path):
        nodes = [
            helper.make_node("SequenceConstruct", ["x", "x"], ["s"], "block.1/pair"),
            helper.make_node("ConcatFromSequence", ["s"], ["y"], "block.1/cat", axis=0),
        ]
        model = make(nodes, [value("x", FP32, [2, 8])], [value("y", FP32, [4, 8])])
        text = self.failure(tmp_path, model)
        assert "node 'block.1/pair' (SequenceConstruct): [UNSUPPORTED_NODE]" in text
        assert "node 'block.1/cat' (ConcatFromSequence)" in text
        assert "Fix: run the passes of the target's preset" in text

    def test_the_parser_on_a_plugin_and_on_normalization_types(self, tmp_path):
        ones = numpy_helper.from_array(np.linspace(1, 2, 64, dtype=np.float32), "g")
        ends = [value("x", FP32, [2, 64])], [value("y", FP32, [2, 64])]
        skip = helper.make_node(
            "SkipLayerNormalization", ["x", "x", "g"], ["y"], "skip", domain="com.microsoft"
        )
        text = self.failure(tmp_path, make([skip], *ends, [ones]))
        assert "node 'skip' (SkipLayerNormalization)" in text
        assert "Fix: this operator is not one of TensorRT's" in text
        halves = [value("x", FP16, [2, 64])], [value("y", FP16, [2, 64])]
        norm = helper.make_node("LayerNormalization", ["x", "g"], ["y"], "norm")
        assert "Fix: cast scale and bias" in self.failure(tmp_path, make([norm], *halves, [ones]))

    def test_the_builder_on_attention_without_a_kernel(self, tmp_path, capfd):
        text = self.failure(tmp_path, attention(same=False, dtype=FP32))
        assert "cannot build" in text
        assert "Fix: run the pass decompose-attention" in text
        captured = capfd.readouterr()
        assert captured.out + captured.err == ""  # native code prints "Internal Error" by itself

    def test_a_builder_that_is_killed(self, tmp_path):
        killed: list[int] = []

        def kill(*_: object) -> None:
            if not killed:
                (child,) = builders()
                killed.append(child.pid)
                child.kill()

        with pytest.raises(DiffcError) as caught:
            build_engine(request(tmp_path, network()), on_progress=kill)
        assert left_behind(tmp_path) == {"m.log"}
        assert killed
        if os.name == "posix":
            assert "killed, most often because the machine ran out of memory (SIGKILL)" in str(caught.value)

    @pytest.mark.skipif(os.name != "posix", reason="the crash was seen on Linux")
    def test_a_builder_that_crashes(self, tmp_path):
        """TensorRT-RTX 1.7.1 dies on an Attention whose query, key and value are one tensor."""
        text = self.failure(tmp_path, attention(same=True, dtype=FP16))
        assert "crashed inside TensorRT (segmentation fault) (SIGSEGV)" in text
        assert "  | [INFO] " in text

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_stopping_ends_the_builder_and_leaves_nothing(self, tmp_path, error):
        children: list[psutil.Process] = []

        def stop(phase: str, *_: int) -> None:
            if phase == "Writing engine":
                children.extend(builders())
                assert (tmp_path / "m.engine.partial").exists()
                raise error

        with pytest.raises(error):
            build_engine(request(tmp_path, network()), on_progress=stop)
        assert left_behind(tmp_path) <= ({"m.log"} if error is RuntimeError else set())
        assert children
        assert not any(c.is_running() for c in children)

    def test_a_parent_that_dies_takes_the_builder_and_its_file_along(self, tmp_path):
        asked = request(tmp_path, network())
        program = f"""
import os, psutil
from pathlib import Path
from diffc.backends.profile import Profile
from diffc.backends.tensorrt.build import EngineRequest, build_engine

def die(phase, *_):
    if phase == "Writing engine":
        print(psutil.Process().children()[0].pid, flush=True)
        os._exit(3)

profile = Profile.of_shapes({{"x": (1, 256)}}, {{"x": (2, 256)}}, {{"x": (4, 256)}})
model, output = Path({str(asked.model)!r}), Path({str(asked.output)!r})
build_engine(EngineRequest("trt-rtx", model, output, (89,), (profile,)), on_progress=die)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, text=True)
        assert done.returncode == 3, done.stderr
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(int(done.stdout)).wait(timeout=20)
        assert left_behind(tmp_path) == {"m.log"}

    def test_a_node_without_a_name_is_known_by_its_number(self, tmp_path):
        model = mixed_types()
        for node in model.graph.node:
            node.name = ""
        assert "(Add): [INVALID_NODE]" in self.failure(tmp_path, model, (profile(64),))


class TestRefusedBeforeTheBuild:
    def refused(self, tmp_path: Path, asked: EngineRequest) -> str:
        with pytest.raises(DiffcError) as caught:
            build_engine(asked)
        assert left_behind(tmp_path) == set()
        return str(caught.value)

    def test_fp8_on_sm86(self, tmp_path):
        text = self.refused(tmp_path, request(tmp_path, network(FP8), (120, 86)))
        assert "FP8 (FLOAT8E4M3FN), which needs SM89 or newer; too old: SM86" in text
        assert "Formats that run there: none, int8" in text
        assert "leave out --sm 86" in text

    @pytest.mark.parametrize(
        ("profiles", "message"),
        [
            ((), r"no optimization profile, and these inputs are dynamic: x [?, 256]"),
            ((profile(name="y"),), "profile 0 names y. Inputs of the model: x"),
            ((profile(), Profile({})), "profile 1 has no shapes for the dynamic input x"),
            ((profile(255),), "1x255 / 2x255 / 4x255 changes a fixed dimension of [?, 256]"),
            ((profile(low=3),), "must hold 1 <= minimum <= optimum <= maximum"),
            ((profile(low=0),), "must hold 1 <= minimum"),
            ((Profile.of_shapes({"x": (1,)}, {"x": (2,)}, {"x": (3,)}),), "must have 2 dimensions"),
        ],
    )
    def test_profiles_that_do_not_fit(self, tmp_path, profiles, message):
        assert message in self.refused(tmp_path, request(tmp_path, network(), profiles=profiles))

    def test_profiles_of_three_sets_must_agree(self):
        with pytest.raises(DiffcError, match="same inputs"):
            Profile.of_shapes({"x": (1,)}, {"x": (1,)}, {"y": (1,)})

    def test_weights_that_are_cut_off_or_gone(self, tmp_path):
        asked = request(tmp_path, network())
        data = tmp_path / "model.onnx_data"
        data.write_bytes(data.read_bytes()[:-1])
        assert "model.onnx_data is cut off" in self.refused(tmp_path, asked)
        data.unlink()
        assert "model.onnx_data is missing" in self.refused(tmp_path, asked)

    def test_targets_and_their_compute_capabilities(self, tmp_path):
        asked = request(tmp_path, network(), ())
        assert "builds for named GPUs" in self.refused(tmp_path, asked)
        for target, sms, message in (
            ("tensorrt", (89,), "leave out --sm"),
            ("ort", (89,), "has no engine"),
            ("openvino", (89,), "unknown target 'openvino'. Known: trt-rtx, tensorrt, ort"),
        ):
            other = EngineRequest(target, asked.model, asked.output, sms, asked.profiles)
            assert message in self.refused(tmp_path, other)

    def test_classic_tensorrt_without_its_wheel_or_a_gpu(self, tmp_path):
        from diffc.backends.tensorrt.build import has_device

        if has_device():
            pytest.skip("this machine has a GPU")
        asked = request(tmp_path, network())
        text = self.refused(
            tmp_path, EngineRequest("tensorrt", asked.model, asked.output, (), asked.profiles)
        )
        assert "diffc doctor" in text or "needs an NVIDIA GPU" in text

    def test_an_output_folder_that_does_not_exist(self, tmp_path):
        asked = request(tmp_path, network())
        other = EngineRequest("trt-rtx", asked.model, tmp_path / "no" / "m.engine", (89,), asked.profiles)
        assert "no such folder" in self.refused(tmp_path, other)
