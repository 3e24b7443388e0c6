"""diffc -> the layout of another tool -> diffc: the same model.onnx_data, or what the layout cannot say (slow)."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import onnx
import pytest

from diffc.cli.main import run
from diffc.commands.export.run import ExportRequest, export
from diffc.compile.spine import CompileRequest, compile_model
from diffc.errors import DiffcError
from diffc.models.sources.locate import locate
from diffc.quantize.checkpoint import Checkpoint
from tests import ROOT
from tests.documents import blocks

pytestmark = [pytest.mark.slow, pytest.mark.compiles]
MODEL = "tiny-sd3"
FLOAT8 = onnx.TensorProto.FLOAT8E4M3FN


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in FP8."""
    return compiled(MODEL, tmp_path_factory.mktemp("first") / "artifact", calibrate="synthetic")


def compiled(model: str, output: Path, **changed: str) -> Path:
    """`model` in FP8, or in the codes that it holds."""
    format = {"format": "fp8"} if model == MODEL or "from_checkpoint" in changed else {}
    request = CompileRequest(
        model,
        output,
        **{**format, **changed},
        targets=("ort",),
        sms=(),
        dtype="float16",
        skip_validation=True,
    )
    return compile_model(request).artifact.folder


def codes(folder: Path) -> dict[str, bytes]:
    """The FP8 weights of an artifact by name."""
    tensors = onnx.load(folder / "model.onnx").graph.initializer
    return {t.name: t.raw_data for t in tensors if t.data_type == FLOAT8}


@pytest.mark.parametrize("layout", ["modelopt-hf", "mto"])
def test_the_weights_come_back_bit_by_bit(layout: str, first: Path, tmp_path: Path) -> None:
    """As codes in a folder of ModelOpt's, and as the amax of quantizers beside the model's own weights."""
    place = tmp_path / ("out.pt" if layout == "mto" else "out")
    export(ExportRequest(first, layout, place))
    if layout == "mto":
        second = compiled(MODEL, tmp_path / "second", from_checkpoint=str(place))
    else:
        second = compiled(str(place), tmp_path / "second")
    assert (second / "model.onnx_data").read_bytes() == (first / "model.onnx_data").read_bytes()


def test_comfyuis_file_has_one_scale_for_joined_layers(first: Path, tmp_path: Path) -> None:
    """q, k and v of the release are one matrix with one scale, and ours have three: these are in 16 bits."""
    place = tmp_path / "out.safetensors"
    written = export(ExportRequest(first, "comfyui", place))
    second = compiled(str(place), tmp_path / "second")
    before, after = codes(first), codes(second)
    assert 5 < len(after) < len(before)
    assert all(before[name] == data for name, data in after.items())
    (expanded,) = (names for reason, names in written.left_out.items() if "16 bits" in reason)
    turned = [name for name in expanded if "qkv" not in name]
    assert turned == [
        "joint_blocks.2.context_block.adaLN_modulation.1.weight"
    ]  # its halves are the other way
    assert len(before) - len(after) >= 3 * (len(expanded) - len(turned))


def test_a_folder_of_diffusers_is_another_model(first: Path, tmp_path: Path) -> None:
    """It holds the values of the codes, rounded to 16 bits, so the calibration is not that of its weights."""
    export(ExportRequest(first, "diffusers", tmp_path / "out"))
    with pytest.raises(DiffcError, match="calibrated on other weights"):
        compiled(str(tmp_path / "out"), tmp_path / "second", from_checkpoint=str(first / "checkpoint"))


def test_migrations_three_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt's LoRA section, diffusers' ModelOpt page and `--hf-ckpt-dir`, as docs/migration.md has them."""
    monkeypatch.chdir(tmp_path)
    texts = (text for _, kind, text in blocks(ROOT / "docs" / "migration.md") if not kind)
    (lines,) = (text.splitlines() for text in texts if "--layout modelopt-hf" in text)
    for line in lines:
        assert run(shlex.split(line)[1:]) == 0, line
    loras = json.loads(Path("inverted-fp8/manifest.json").read_text())["model"]["loras"]
    assert [(lora["file"], lora["weight"]) for lora in loras] == [("digits-inverted", 0.9)]
    quantizers = Checkpoint.load(Path("kept-fp8/checkpoint")).settings
    assert quantizers
    assert not any("norm_out" in name for name in quantizers)
    held = locate("kept-fp8-hf").held
    kept = {
        name.removesuffix(".weight_quantizer") for name in quantizers if name.endswith(".weight_quantizer")
    }
    assert held.keys() == kept
