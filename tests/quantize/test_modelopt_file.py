"""Files of ModelOpt's mto.save: all of its formats are read, what is no such file or no format is said."""

from __future__ import annotations

import pickle
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.opt.config_loader import load_config
from modelopt.torch.quantization.config import QuantizeConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.registry import FAMILIES
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import enabled_quantizers, layer_of, role_of
from diffc.quantize.simulate import cpu_block_quant
from tests.backbones import backbone_of, forward, make_portable


def preset(name: str) -> dict[str, Any]:
    """A quantization config that ModelOpt ships for diffusion models."""
    loaded = load_config(f"configs/ptq/presets/diffusers/{name}", schema_type=QuantizeConfig)
    return dict(loaded.model_dump(exclude_unset=True))


def modelopt_model(family: str, config: dict[str, Any]) -> nn.Module:
    """As ModelOpt's script does it: everything is calibrated, then the filter switches layers off."""
    backbone = backbone_of(family)
    with torch.no_grad(), cpu_block_quant(), redirect_stdout(StringIO()):
        mtq.quantize(backbone, config, lambda b: forward(b, family, seed=0))
    mtq.disable_quantizer(backbone, lambda name: bool(re.match(FAMILIES[family].unquantized, name)))
    return backbone


@pytest.mark.parametrize(("family", "format"), [("sd3", "int8"), ("sdxl", "fp8"), ("flux", "fp8")])
def test_modelopt_files_are_read(family: str, format: str, tmp_path: Path) -> None:
    theirs = modelopt_model(family, preset(format))
    mto.save(theirs, tmp_path / "backbone.pt")
    with FakeTensorMode():
        fake = backbone_of(family)
    read = Checkpoint.from_modelopt(tmp_path / "backbone.pt", fake, family=family)
    assert read.format == format
    ours = backbone_of(family)
    read.apply(ours, family)
    by_accident = {
        name
        for name in enabled_quantizers(theirs)
        if isinstance(theirs.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)
    }
    assert by_accident  # ModelOpt's presets still quantize the inputs of norms
    assert not by_accident & enabled_quantizers(ours).keys()
    for name in by_accident:
        theirs.get_submodule(name).disable()
    make_portable(theirs)
    assert torch.equal(forward(ours, family), forward(theirs, family))


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_modelopt_files_never_run_code(tmp_path: Path) -> None:
    torch.save({"modelopt_state": Evil(tmp_path / "ran"), "model_state_dict": {}}, tmp_path / "evil.pt")
    with pytest.raises(DiffcError, match="objects that could run code"):
        Checkpoint.from_modelopt(tmp_path / "evil.pt", nn.Linear(1, 1), family="flux")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DiffcError, match=r"damaged, or not a file of torch\.save"):
        Checkpoint.from_modelopt(tmp_path / "old.pt", nn.Linear(1, 1), family="flux")


def test_other_files_of_torch_are_refused(tmp_path: Path) -> None:
    backbone = backbone_of("flux")
    with pytest.raises(DiffcError, match="no such file"):
        Checkpoint.from_modelopt(tmp_path / "none.pt", backbone, family="flux")
    torch.save({"weight": torch.ones(3)}, tmp_path / "plain.pt")
    mto.save(backbone, tmp_path / "unquantized.pt")
    for name in ("plain.pt", "unquantized.pt"):
        with pytest.raises(DiffcError, match="not a checkpoint of a model that ModelOpt quantized"):
            Checkpoint.from_modelopt(tmp_path / name, backbone, family="flux")
    content = (tmp_path / "unquantized.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(DiffcError, match="damaged"):
        Checkpoint.from_modelopt(tmp_path / "cut.pt", backbone, family="flux")


def attention_quantized() -> dict[str, Any]:
    config = preset("fp8")
    fp8 = {"num_bits": (4, 3), "axis": None}
    return config | {
        "quant_cfg": [*config["quant_cfg"], {"quantizer_name": "*[qkv]_bmm_quantizer", "cfg": fp8}]
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (attention_quantized, None),
        (lambda: mtq.MXFP4_DEFAULT_CFG, "no format of diffc has quantizers like"),
        (lambda: mtq.INT8_WEIGHT_ONLY_CFG, None),
        (lambda: mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, "no format of diffc has quantizers like"),
    ],
)
def test_kinds_that_do_not_compile_are_refused(config: Any, message: str | None, tmp_path: Path) -> None:
    mto.save(modelopt_model("flux", config()), tmp_path / "b.pt")
    if message is None:
        found = Checkpoint.from_modelopt(tmp_path / "b.pt", backbone_of("flux"), family="flux")
        assert found.format == ("fp8" if config is attention_quantized else "int8")
        assert any(role_of(n) == "q_bmm_quantizer" for n in found.settings) == (found.format == "fp8")
        return
    with pytest.raises(UnsupportedError, match=message):
        Checkpoint.from_modelopt(tmp_path / "b.pt", backbone_of("flux"), family="flux")


def test_a_modelopt_file_of_another_model_is_refused(tmp_path: Path) -> None:
    mto.save(modelopt_model("flux", preset("fp8")), tmp_path / "b.pt")
    with FakeTensorMode():
        shallower = backbone_of("flux", num_single_layers=1)
        wider = backbone_of("flux", num_attention_heads=3)
    for other in (shallower, wider):
        with pytest.raises(DiffcError, match="is of another model: the weight of"):
            Checkpoint.from_modelopt(tmp_path / "b.pt", other, family="flux")


PRESETS: dict[str, Any] = {
    "int8_smoothquant": mtq.INT8_SMOOTHQUANT_CFG,
    "int4_awq": mtq.INT4_AWQ_CFG,
    "w4a8_awq": mtq.W4A8_AWQ_BETA_CFG,
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "nvfp4_svdquant": mtq.NVFP4_SVDQUANT_DEFAULT_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
}


@pytest.mark.parametrize("format", PRESETS)
def test_files_of_modelopt_are_read(format: str, tmp_path: Path) -> None:
    theirs = modelopt_model("flux", PRESETS[format])
    mto.save(theirs, tmp_path / "b.pt")
    with FakeTensorMode():
        fake = backbone_of("flux")
    read = Checkpoint.from_modelopt(tmp_path / "b.pt", fake, family="flux")
    assert read.format == format
    read.save(tmp_path / "c")
    ours = backbone_of("flux")
    Checkpoint.load(tmp_path / "c").apply(ours, "flux")
    layers = [layer_of(n) for n in enabled_quantizers(ours) if role_of(n) == "weight_quantizer"]
    assert len(layers) > 8
    for path in layers:
        expected = theirs.get_submodule(path).weight
        torch.testing.assert_close(ours.get_submodule(path).weight, expected, rtol=1e-5, atol=1e-6)
    for name in enabled_quantizers(theirs):  # ModelOpt's presets quantize the inputs of norms by accident
        if layer_of(name) not in layers:
            theirs.get_submodule(name).disable()
    difference = forward(ours, "flux") - forward(theirs, "flux")
    # amax become portable: a grid up to 1/128 wider moves values by a part of a step.
    assert float(difference.norm() / forward(theirs, "flux").norm()) < 0.02
    exact = forward(backbone_of("flux"), "flux")
    loss = [float((forward(b, "flux") - exact).norm() / exact.norm()) for b in (ours, theirs)]
    assert loss[0] == pytest.approx(loss[1], rel=0.15)
    assert loss[1] > 1e-3


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """ModelOpt fills a partial block of INT4 up; no kernel does."""
    quantize_all = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
            },
        ],
        "algorithm": "max",
    }
    theirs = backbone_of("flux")
    with torch.no_grad(), redirect_stdout(StringIO()):
        mtq.quantize(theirs, quantize_all)
    mto.save(theirs, tmp_path / "b.pt")
    with pytest.raises(UnsupportedError, match=r"linear_1 \[128, 64\] is not whole blocks of 128"):
        Checkpoint.from_modelopt(tmp_path / "b.pt", backbone_of("flux"), family="flux")
