"""Compiles of quantized files: the codes in model.onnx_data are those of the file."""

from __future__ import annotations

import re
from itertools import cycle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from diffc.compile.spine import CompileRequest, compile_model
from diffc.compile.stored import format_of, held_checkpoint
from diffc.errors import DiffcError, UsageError
from diffc.models.sources.backbone import FakeBackbone
from diffc.models.sources.locate import locate
from diffc.quantize.formats import STORED
from tests.models.single.releases import released, save
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
    check_compiled(eight_bits, tmp_path)


@pytest.mark.slow
@pytest.mark.compiles
def test_a_file_of_every_kind_is_compiled_with_its_own_codes(mixed: Path, tmp_path: Path) -> None:
    check_compiled(mixed, tmp_path)


def check_compiled(mixed: Path, tmp_path: Path) -> None:
    """Compile the file, which validates it, and look for its codes in what was written."""
    result = compile_model(CompileRequest(str(mixed), tmp_path / "out"))
    assert result.artifact.manifest["format"] == STORED.name
    source, model = locate(str(mixed)), onnx.load(tmp_path / "out" / "model.onnx")
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
