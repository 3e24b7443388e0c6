"""Where quantizers go, and calibration through the real pipelines."""

from __future__ import annotations

import subprocess
import sys

import diffusers
import pytest
import torch
from torch import nn

from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import materialize
from diffc.models.registry import FAMILIES
from diffc.quantize.calibrate import DEFAULT_PROMPTS, calibrate
from diffc.quantize.convert import enabled_quantizers, insert_quantizers
from diffc.quantize.formats import FORMATS

SMALL = {"height": 64, "width": 64}


def test_presets_are_those_of_modelopt() -> None:
    kinds = {}
    for name in ("int8", "fp8"):
        layer = nn.Sequential(nn.Linear(8, 8))
        insert_quantizers(layer, FORMATS[name], "$^")
        kinds[name] = {path[2:]: (q.num_bits, q.axis) for path, q in enabled_quantizers(layer).items()}
    assert kinds == {
        "int8": {"input_quantizer": (8, None), "weight_quantizer": (8, 0)},
        "fp8": {"input_quantizer": ((4, 3), None), "weight_quantizer": ((4, 3), None)},
    }
    assert [FORMATS[name].weight_bits for name in ("none", "int8", "fp8")] == [None, 8, 8]


def test_formats_are_read_without_torch() -> None:
    code = "import diffc.quantize.formats, sys; sys.exit('torch' in sys.modules or 'modelopt' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def pipeline_of(model: str) -> diffusers.DiffusionPipeline:
    pipe = diffusers.DiffusionPipeline.from_pretrained(materialize(model), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: diffusers.DiffusionPipeline, family: str, format: str = "fp8", **changed: object) -> list:
    """Calibrate on two prompts, one step each, unless `changed` says otherwise; returns the progress."""
    spec, seen = FAMILIES[family], []
    settings = {"prompts": DEFAULT_PROMPTS[:2], "steps": 1, "seed": 5, "batch_size": 1} | changed
    calibrate(
        pipe,
        spec.component,
        FORMATS[format],
        spec.unquantized,
        usual=spec.calibration,
        **SMALL,
        progress=lambda done, total: seen.append((done, total)),
        **settings,
    )
    return seen


def amax_of(backbone: nn.Module) -> dict[str, torch.Tensor]:
    return {path: quantizer.amax for path, quantizer in enabled_quantizers(backbone).items()}


def assert_next_portable(amax: torch.Tensor, observed: torch.Tensor) -> None:
    """A step of bfloat16 above what was seen, at most (1e-6: float32 rounding of the hook's own run)."""
    assert (amax >= observed * (1 - 1e-6)).all()
    assert (amax <= observed * (1 + 2**-7 + 1e-6)).all()


def test_calibration_is_deterministic_and_seeded() -> None:
    runs = []
    for seed in (5, 5, 50):  # prompt i has seed + i, so 5 and 6 would share a noise
        pipe = pipeline_of("tiny-sd3")
        assert run(pipe, "sd3", seed=seed) == [(1, 2), (2, 2)]
        runs.append(amax_of(pipe.transformer))
    assert all(torch.equal(runs[0][path], runs[1][path]) for path in runs[0])
    inputs = [path for path in runs[0] if path.endswith("input_quantizer")]
    moved = [path for path in inputs if not torch.equal(runs[0][path], runs[2][path])]
    assert len(moved) > len(inputs) / 4  # another noise; amax come in steps, so some stay


@pytest.mark.parametrize(
    ("model", "family", "layer"),
    [
        ("tiny-sd35", "sd3", "transformer_blocks.1.attn2.to_v"),
        ("tiny-flux", "flux", "single_transformer_blocks.0.proj_mlp"),
        ("tiny-sdxl", "sdxl", "up_blocks.0.resnets.0.conv2"),
    ],
)
def test_amax_is_what_the_pipeline_sends_through_the_layer(model: str, family: str, layer: str) -> None:
    """Against a hook on the unquantized pipeline, from the same noise."""
    pipe, spec, largest = pipeline_of(model), FAMILIES[family], []
    module = getattr(pipe, spec.component).get_submodule(layer)
    hook = module.register_forward_pre_hook(lambda _, args: largest.append(args[0].abs().max()))
    with torch.no_grad():
        arguments = {**spec.calibration, **SMALL, "output_type": "latent", "num_inference_steps": 2}
        pipe([DEFAULT_PROMPTS[2]], generator=[torch.Generator().manual_seed(7)], **arguments)
    hook.remove()
    assert run(pipe, family, "int8", prompts=DEFAULT_PROMPTS[2:3], steps=2, seed=7) == [(1, 2), (2, 2)]
    amax = amax_of(getattr(pipe, spec.component))
    assert len(largest) == 2
    assert_next_portable(amax[f"{layer}.input_quantizer"], torch.stack(largest).max())
    weight = module.weight.abs().flatten(1).amax(1)
    assert_next_portable(amax[f"{layer}.weight_quantizer"].flatten(), weight)
    assert all(value.dtype == torch.float32 and (value > 0).all() for value in amax.values())


@pytest.fixture(scope="module")
def sd3() -> diffusers.DiffusionPipeline:
    """A pipeline whose transformer every test below replaces."""
    return pipeline_of("tiny-sd3")


@pytest.fixture
def fresh(sd3: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
    sd3.transformer = backbone_of_pipeline()
    return sd3


def backbone_of_pipeline() -> nn.Module:
    folder = materialize("tiny-sd3") / "transformer"
    return diffusers.SD3Transformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)


ONE = {"prompts": DEFAULT_PROMPTS[:1]}


def test_a_channel_of_zeros_keeps_a_usable_scale(fresh: diffusers.DiffusionPipeline) -> None:
    layer = fresh.transformer.transformer_blocks[0].attn.to_k
    with torch.no_grad():
        layer.weight[3] = 0
    run(fresh, "sd3", "int8", **ONE)
    amax = layer.weight_quantizer.amax.flatten()
    assert_next_portable(amax[3], torch.tensor(1.0))
    assert_next_portable(amax[:3], layer.weight.abs().amax(1)[:3])


def test_calibration_names_the_layer_that_has_no_scale(fresh: diffusers.DiffusionPipeline) -> None:
    fresh.transformer.spare = nn.Linear(8, 8)
    with pytest.raises(DiffcError, match=r"spare.input_quantizer was never run[\s\S]*unquantized"):
        run(fresh, "sd3", **ONE)


def test_calibration_names_the_layer_of_zeros(fresh: diffusers.DiffusionPipeline) -> None:
    nn.init.zeros_(fresh.transformer.transformer_blocks[1].ff.net[2].weight)
    with pytest.raises(DiffcError, match=r"1\.ff\.net\.2\.weight_quantizer saw nothing but zeros"):
        run(fresh, "sd3", **ONE)


def test_calibration_names_the_layer_that_overflows(fresh: diffusers.DiffusionPipeline) -> None:
    with torch.no_grad():
        values = fresh.transformer.transformer_blocks[0].attn.to_v
        values.weight[0], values.bias[0] = 2e38, 3.4e38  # finite, and their sum with nearly any input is not
    with pytest.raises(DiffcError, match=r"0\.attn\.\S*input_quantizer saw NaN or infinity[\s\S]*bfloat16"):
        run(fresh, "sd3", **ONE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": ()}, "no prompts"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"batch_size": 0}, "batch size is 0, expected at least 1"),
    ],
)
def test_calibration_refuses_bad_settings(
    fresh: diffusers.DiffusionPipeline, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(DiffcError, match=message):
        run(fresh, "sd3", **changed)
    assert not enabled_quantizers(fresh.transformer)


def test_calibration_refuses_a_component_that_the_pipeline_lacks(fresh: diffusers.DiffusionPipeline) -> None:
    with pytest.raises(DiffcError, match=r"unknown component .*'unet'\. Known: .*transformer"):
        run(fresh, "sdxl")


def test_default_prompts_are_varied() -> None:
    assert len(set(DEFAULT_PROMPTS)) == len(DEFAULT_PROMPTS) >= 12
    assert min(map(len, DEFAULT_PROMPTS)) < 30 < 80 < max(map(len, DEFAULT_PROMPTS))


def test_what_a_pipeline_raises_is_one_message(fresh: diffusers.DiffusionPipeline) -> None:
    def fail(*_: object) -> None:
        raise OverflowError("int too big to convert")

    handle = fresh.transformer.register_forward_pre_hook(fail)
    with pytest.raises(
        DiffcError, match=r"StableDiffusion3Pipeline failed on .*OverflowError: int too big[\s\S]*--debug"
    ):
        run(fresh, "sd3")
    handle.remove()
