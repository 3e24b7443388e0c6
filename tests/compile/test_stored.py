"""Compiles of quantized files: the codes in model.onnx_data are those of the file."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from diffc.compile.held_checkpoint import held_checkpoint
from diffc.compile.spine import CompileRequest, compile_model
from diffc.compile.stored import format_of
from diffc.errors import DiffcError, UsageError
from diffc.models.sources.backbone import FakeBackbone
from diffc.models.sources.locate import locate
from diffc.quantize.formats import STORED
from tests.conftest import HAS_RTX
from tests.models.single.releases import released, save
from tests.models.single.test_gguf import of_four_bits, write
from tests.models.stored.quantized import MAKERS, quantized

BLOCKS = re.compile(r"(double|single)_blocks\.\d+\.(img_attn|txt_attn|img_mlp|txt_mlp|linear)")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-flux as a file of every kind of layer, in turn."""
    kinds = cycle(MAKERS)
    state = quantized(released("tiny-flux")[0], lambda name: next(kinds) if BLOCKS.match(name) else "")
    return save(state, tmp_path_factory.mktemp("stored") / "mixed.safetensors")


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-flux as a file of FP8 and INT8 layers in turn."""
    kinds = cycle(("fp8", "fp8 weights", "int8"))
    state = quantized(released("tiny-flux")[0], lambda name: next(kinds) if BLOCKS.match(name) else "")
    return save(state, tmp_path_factory.mktemp("stored") / "eight.safetensors")


@pytest.mark.compiles
def test_a_file_of_8_bits_is_compiled_with_its_own_codes(eight_bits: Path, tmp_path: Path) -> None:
    check_compiled(CompileRequest(str(eight_bits), tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.compiles
def test_a_file_of_every_kind_is_compiled_with_its_own_codes(mixed: Path, tmp_path: Path) -> None:
    check_compiled(on_all_targets(mixed, tmp_path, 120))
    assert engines(tmp_path) == ({"trt-rtx-sm120.engine"} if HAS_RTX else set())


@pytest.mark.slow
@pytest.mark.compiles
def test_a_gguf_of_q4_0_is_compiled_with_its_own_codes(tmp_path: Path) -> None:
    path = write(tmp_path / "flux.gguf", of_four_bits())
    compile_model(on_all_targets(path, tmp_path, 89))
    assert engines(tmp_path) == ({"trt-rtx-sm89.engine"} if HAS_RTX else set())
    model, source = onnx.load(tmp_path / "out" / "model.onnx"), locate(str(path))
    stored = [bytes(t.raw_data) for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert len(stored) == len(source.held) > 10


def on_all_targets(file: Path, tmp_path: Path, sm: int) -> CompileRequest:
    """For ONNX Runtime, which validation runs, and an engine where there is a builder."""
    request = CompileRequest(str(file), tmp_path / "out")
    return replace(request, targets=("ort", "trt-rtx"), sms=(sm,)) if HAS_RTX else request


def engines(tmp_path: Path) -> set[str]:
    """The names of the engines that were built."""
    return {path.name for path in (tmp_path / "out" / "engines").glob("*.engine")}


def check_compiled(request: CompileRequest) -> None:
    """Compile the file, which validates it, and look for its codes in what was written."""
    result, mixed = compile_model(request), Path(request.model)
    assert result.artifact.manifest["format"] == STORED.name
    source, model = locate(str(mixed)), onnx.load(request.output / "model.onnx")
    stored = [bytes(t.raw_data) for t in model.graph.initializer]
    file = mixed.read_bytes()
    for name, layer in source.held.items():
        recipe = layer.weight.source
        if layer.kind in ("fp8", "int8", "mxfp8"):
            codes = np.frombuffer(file[recipe.offset : recipe.offset + recipe.length], np.uint8).reshape(
                recipe.shape
            )
            assert codes.tobytes() in stored or codes.T.tobytes() in stored, name
    types = {t.data_type for t in model.graph.initializer}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN} <= types


class TestFormat:
    def test_a_quantized_file_is_kept_and_a_plain_one_is_not(self, mixed: Path) -> None:
        assert format_of("auto", locate(str(mixed))) is STORED
        assert format_of("auto", locate("tiny-flux")).name == "none"

    def test_a_plain_model_has_nothing_stored(self) -> None:
        with pytest.raises(UsageError, match="nothing stored to keep"):
            format_of("stored", locate("tiny-flux"))

    def test_a_gpu_without_the_codes_is_refused_before_any_work(self, mixed: Path, tmp_path: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        request = CompileRequest(str(mixed), tmp_path / "out", targets=("trt-rtx",), sms=(89,))
        with pytest.raises(DiffcError, match="nvfp4"):
            compile_model(request)


def test_inputs_are_quantized_as_the_file_says(mixed: Path) -> None:
    source = locate(str(mixed)).as_held()
    checkpoint = held_checkpoint(source, FakeBackbone(source, "bfloat16"))
    assert checkpoint is not None
    for name, layer in source.held.items():
        path = f"{name}.input_quantizer"
        assert (path in checkpoint.settings) == (layer.input is not None)
        if layer.input is not None and layer.input.kind == "fp8":
            scale = torch.tensor(checkpoint.amax[path] / np.float32(448)).item()
            assert 0.02 <= scale <= 0.02 * (1 + 1 / 128)  # the next one that 16-bit types hold
