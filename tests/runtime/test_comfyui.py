"""What ComfyUI gives reaches the inputs of a UNet without a family file; the others run in test_package_comfyui."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from diffc.backends.signature import Signature, Value
from diffc.errors import DiffcError
from diffc.models.captured import captured_family
from diffc.models.interface import Dimension, Input, Interface, Output
from diffc.models.relation import Relation
from diffc.runtime.comfyui import ComfyModel, Denoiser
from diffc.runtime.comfyui_calls import unet
from diffc.runtime.module import CompiledBackbone

DIMS = ("batch", 4, "height", "width")
CONFIG = {"in_channels": 4, "cross_attention_dim": 768}
SD = Interface(
    backbone_class="UNet2DConditionModel",
    component="unet",
    pipeline_class="StableDiffusionPipeline",
    inputs=(
        Input("sample", ("sample",), "model", DIMS),
        Input("timestep", ("timestep",), "float32", (), "time", 0, 999),
        Input("encoder_hidden_states", ("encoder_hidden_states",), "model", ("batch", "text", 768)),
    ),
    constants=(),
    tuples=(),
    dimensions=tuple(Dimension(name, Relation(())) for name in ("batch", "height", "width", "text")),
    outputs=(Output("out_sample", DIMS),),
    output_class="diffusers.models.unets.unet_2d_condition:UNet2DConditionOutput",
    attributes={},
    batch=2,
    multiple=8,
    frames=None,
    native={"batch": 1, "height": 512, "width": 512, "frames": 1, "text": 77},
)


class Sum:
    """A session whose output tells what every input was: sample + timestep + the mean of the text."""

    device = torch.device("cpu")

    def run(
        self, inputs: Mapping[str, Tensor], output_shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        text = inputs["encoder_hidden_states"].mean((1, 2))[:, None, None, None]
        return {
            "out_sample": (inputs["sample"] + inputs["timestep"] + text).reshape(output_shapes["out_sample"])
        }

    def close(self) -> None:
        """Nothing is held."""


def backbone() -> CompiledBackbone:
    values = tuple(Value(i.name, "FLOAT", i.dims) for i in SD.inputs)
    signature = Signature(values, (Value("out_sample", "FLOAT", DIMS),))
    family = captured_family(SD, CONFIG)
    return CompiledBackbone(Sum(), signature, family, CONFIG, torch.float32, "ort")


def test_a_unet_gets_latents_one_time_and_text() -> None:
    denoiser = Denoiser(backbone(), ComfyModel("SD15", "BaseModel", "EPS", unet))
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 768)
    times = torch.tensor([501.0, 501.0])
    found = denoiser(x, times, context=text, transformer_options={"cond_or_uncond": [1, 0]})
    assert torch.allclose(found, x + 501 + text.mean((1, 2))[:, None, None, None], atol=1e-4)
    assert denoiser.dtype == torch.float32
    assert not list(denoiser.modules())[1:]
    with pytest.raises(DiffcError, match="timestep has shape"):
        denoiser(x, torch.tensor([501.0, 1.0]), context=text)
    with pytest.raises(DiffcError, match="reference latents"):
        denoiser(x, times, context=text, ref_latents=[x])
