"""What mto.save writes of a backbone that diffc calibrated, ModelOpt restores, with the same output."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import pytest
import torch
from torch import nn

from diffc.models.registry import FAMILIES
from diffc.quantize.calibrate import calibrate
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import enabled_quantizers
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import QuantOptions
from tests.backbones import backbone_of, forward


class OneCall:
    """A pipeline whose call runs its backbone once on random inputs."""

    num_timesteps = 1

    def __init__(self, family: str) -> None:
        self.family, self.transformer = family, backbone_of(family)

    def set_progress_bar_config(self, **_: Any) -> None: ...

    def __call__(self, **_: Any) -> None:
        forward(self.transformer, self.family, seed=0)


def calibrated(family: str, format: str, options: QuantOptions) -> nn.Module:
    pipe = OneCall(family)
    calibrate(
        pipe,
        "transformer",
        FORMATS[format],
        FAMILIES[family].unquantized,
        prompts=["a"],
        steps=1,
        seed=0,
        batch_size=1,
        height=64,
        width=64,
        usual={},
        progress=lambda done, total: None,
        options=options,
    )
    return pipe.transformer


@pytest.mark.parametrize(
    ("family", "format", "options"),
    [
        ("sdxl", "int8", QuantOptions()),
        ("sd3", "fp8", QuantOptions(mha=True)),
        ("flux", "int8_smoothquant", QuantOptions()),
        ("flux", "int4_awq", QuantOptions()),
        ("flux", "w4a8_awq", QuantOptions(keep=("*.ff.*",))),
        ("sd3", "nvfp4_svdquant", QuantOptions(lowrank=4)),
        ("flux", "mxfp8", QuantOptions()),
    ],
)
def test_modelopt_restores_what_it_saved(
    family: str, format: str, options: QuantOptions, tmp_path: Path
) -> None:
    ours = calibrated(family, format, options)
    with torch.no_grad():
        next(iter(ours.parameters())).mul_(1.5)
    mto.save(ours, tmp_path / "b.pt")
    theirs = backbone_of(family)
    with redirect_stdout(StringIO()):
        mto.restore(theirs, tmp_path / "b.pt")
    assert enabled_quantizers(theirs).keys() == enabled_quantizers(ours).keys()
    assert len(enabled_quantizers(ours)) > 8
    torch.testing.assert_close(forward(theirs, family), forward(ours, family), rtol=1e-5, atol=1e-6)
    read = Checkpoint.from_modelopt(tmp_path / "b.pt", backbone_of(family), family=family)
    assert read.settings == Checkpoint.from_backbone(ours, family=family, format=format).settings


def test_modules_that_are_left_alone_keep_their_class() -> None:
    ours, plain = calibrated("flux", "fp8", QuantOptions()), backbone_of("flux")
    kept = [name for name, module in ours.named_modules() if type(module) is nn.LayerNorm]
    assert kept == [name for name, module in plain.named_modules() if type(module) is nn.LayerNorm]
    assert all(not ours.get_submodule(name).input_quantizer.is_enabled for name in kept)
    assert kept
