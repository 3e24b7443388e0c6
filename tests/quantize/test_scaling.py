"""Formats that change weights: the factors, the branches, and that a checkpoint brings all of it back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from diffc.errors import DiffcError
from diffc.frontend.recipes import scaled_weight
from diffc.models.embedded import tiny
from diffc.models.registry import FAMILIES
from diffc.quantize.calibrate import calibrate
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import enabled_quantizers, insert_quantizers, layer_of, role_of
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import QuantOptions
from diffc.quantize.simulate import cpu_block_quant
from diffc.quantize.state import portable_values
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe
from passes.weights.sources import onnx_dtype

CONFIG = tiny.FLUX | {"num_layers": 1, "num_single_layers": 1}
SCALED = ("int8_smoothquant", "int4_awq", "w4a8_awq", "nvfp4_svdquant")
PROMPTS = ("one", "two")


def backbone_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights that bfloat16 holds exactly, so that every compute type begins with the same ones."""
    torch.manual_seed(21)
    made = diffusers.FluxTransformer2DModel(**CONFIG).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return made if dtype == torch.float32 else made.to(dtype)


def inputs_of(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A prompt's tensors; some channels are far larger than others, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(128, generator=torch.Generator().manual_seed(1)))
    grid = torch.arange(16)
    return {
        "hidden_states": torch.randn(1, 16, 64, generator=generator).to(dtype),
        "encoder_hidden_states": (torch.randn(1, 5, 128, generator=generator) * spread).to(dtype),
        "pooled_projections": torch.randn(1, 64, generator=generator).to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.stack([grid * 0, grid // 4, grid % 4], dim=1).float(),
        "txt_ids": torch.zeros(5, 3),
    }


def forward(backbone: nn.Module, seed: int = 90) -> torch.Tensor:
    dtype = next(backbone.parameters()).dtype
    with torch.no_grad(), cpu_block_quant():
        out: torch.Tensor = backbone(**inputs_of(seed, dtype), return_dict=False)[0]
    return out


class Pipe:
    """What calibration needs of a pipeline: every prompt is one call of the backbone on seeded noise."""

    def __init__(self, backbone: nn.Module) -> None:
        self.transformer, self.components = backbone, {"transformer": backbone}
        self.num_timesteps = 1

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(self, *, generator: list[torch.Generator], **arguments: Any) -> None:
        for one in generator:
            self.transformer(**inputs_of(one.initial_seed(), torch.float32))
        arguments["callback_on_step_end"](self, 0, None, {})


def calibrated(format: str, options: QuantOptions | None = None) -> nn.Module:
    backbone = backbone_of()
    calibrate(
        Pipe(backbone),
        "transformer",
        FORMATS[format],
        FAMILIES["flux"].unquantized,
        prompts=PROMPTS,
        steps=1,
        seed=40,
        batch_size=1,
        usual={},
        height=64,
        width=64,
        progress=lambda done, total: None,
        options=options or QuantOptions(),
    )
    return backbone


_kept: dict[str, nn.Module] = {}


@pytest.fixture
def made(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A format's calibrated backbone, made once, and its checkpoint."""
    format = request.param
    if format not in _kept:
        _kept[format] = calibrated(format)
    backbone = _kept[format]
    checkpoint = Checkpoint.from_backbone(backbone, family="flux", format=format)
    return SimpleNamespace(format=format, backbone=backbone, checkpoint=checkpoint)


every = pytest.mark.parametrize("made", [f for f in FORMATS if f not in ("none", "mxfp8")], indirect=True)
scaled = pytest.mark.parametrize("made", SCALED, indirect=True)


def layers_of(backbone: nn.Module) -> list[str]:
    names = enabled_quantizers(backbone)
    return list(dict.fromkeys(layer_of(n) for n in names if role_of(n) == "weight_quantizer"))


def linear(backbone: nn.Module, path: str) -> Any:
    return backbone.get_submodule(path)


def channel_amax(backbone: nn.Module, paths: list[str]) -> dict[str, torch.Tensor]:
    """Largest |input| of every channel over the calibration's prompts, by hooks on the unquantized model."""
    found: dict[str, torch.Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any) -> None:
            amax = args[0].detach().abs().flatten(0, -2).amax(0)
            found[path] = torch.maximum(found[path], amax) if path in found else amax

        return hook

    handles = [linear(backbone, path).register_forward_pre_hook(note(path)) for path in paths]
    for i in range(len(PROMPTS)):
        forward(backbone, 40 + i)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_smoothquant_factors_are_those_of_the_formula(alpha: float) -> None:
    """weight amax^(1 - alpha) / input amax^alpha for each channel, rounded; and the weight is divided by it."""
    backbone, plain = calibrated("int8_smoothquant", QuantOptions(alpha=alpha)), backbone_of()
    amax = channel_amax(plain, layers_of(backbone))
    for path in layers_of(backbone):
        original, layer = linear(plain, path).weight.double(), linear(backbone, path)
        factor = original.abs().amax(0) ** (1 - alpha) / amax[path].double() ** alpha
        found = layer.input_quantizer.pre_quant_scale.double()
        torch.testing.assert_close(found, factor.clamp(1e-4, 1e4), rtol=2**-8, atol=0)
        torch.testing.assert_close(layer.weight.double(), original / found, rtol=1e-6, atol=0)
        largest = (amax[path].double() * found).max()
        assert largest * (1 - 1e-5) <= layer.input_quantizer.amax <= largest * (1 + 2**-7 + 1e-5)


def test_alpha_moves_outliers() -> None:
    """At 1 all inputs are of one size; at 0 all columns of a weight are."""
    spread = {}
    for alpha in (0.0, 1.0):
        backbone = calibrated("int8_smoothquant", QuantOptions(alpha=alpha))
        layer = linear(backbone, "transformer_blocks.0.attn.add_k_proj")
        columns = layer.weight.abs().amax(0)
        spread[alpha] = float(columns.max() / columns.min())
    assert spread[0.0] < 1.02
    assert spread[1.0] > 5


@scaled
def test_factors_are_portable_and_the_weight_makes_up_for_them(made: SimpleNamespace) -> None:
    plain = backbone_of()
    for path in layers_of(made.backbone):
        layer = linear(made.backbone, path)
        factor = layer.input_quantizer.pre_quant_scale
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(factor.to(dtype).float(), factor)
        if made.format != "nvfp4_svdquant":
            assert torch.equal(layer.weight, linear(plain, path).weight * (1.0 / factor))


@pytest.mark.parametrize("format", ["int4_awq", "nvfp4_svdquant"])
def test_factors_are_those_of_modelopt_rounded(format: str) -> None:
    """ModelOpt's own calibration on the same inputs, without ours around it."""
    fmt, theirs = FORMATS[format], backbone_of()
    insert_quantizers(theirs, fmt, FAMILIES["flux"].unquantized)

    def loop(backbone: nn.Module) -> None:
        for i in range(len(PROMPTS)):
            backbone(**inputs_of(40 + i, torch.float32))

    with torch.no_grad(), cpu_block_quant(), redirect_stdout(StringIO()):
        mtq.calibrate(theirs, {"method": fmt.algorithm}, forward_loop=loop)
    ours = _kept.setdefault(format, calibrated(format))
    for path in layers_of(ours):
        factor = linear(theirs, path).input_quantizer.pre_quant_scale
        assert torch.equal(linear(ours, path).input_quantizer.pre_quant_scale, portable_values(factor))
        assert not torch.equal(factor, portable_values(factor))


@pytest.mark.parametrize("rank", [4, 32])
def test_branches_are_the_best_of_their_rank(rank: int) -> None:
    """Of the scaled weight, by another implementation of the SVD, to the rounding of the two matrices."""
    backbone, plain = calibrated("nvfp4_svdquant", QuantOptions(lowrank=rank)), backbone_of()
    for path in layers_of(backbone):
        layer, quantizer = linear(backbone, path), linear(backbone, path).weight_quantizer
        a, b = quantizer.svdquant_lora_a, quantizer.svdquant_lora_b
        assert (a.shape, b.shape) == ((rank, layer.in_features), (layer.out_features, rank))
        assert all(torch.equal(part, portable_values(part)) for part in (a, b))
        whole = (linear(plain, path).weight * (1.0 / layer.input_quantizer.pre_quant_scale)).double().numpy()
        u, s, vt = np.linalg.svd(whole, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        branch = b.double().numpy() @ a.double().numpy()
        assert np.linalg.norm(branch - best) < 2**-7 * np.linalg.norm(best)
        # What the rounding of the branch leaves is in the rest, so that nothing is lost.
        rest = layer.weight.double().numpy()
        assert np.linalg.norm(rest + branch - whole) < 1e-6 * np.linalg.norm(whole)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_brings_the_backbone_back(
    made: SimpleNamespace, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Bit for bit in float32, but for the branch, which ModelOpt subtracts in float32 and we in float64."""
    made.checkpoint.save(tmp_path / "c")
    fresh = backbone_of(dtype)
    plain = forward(fresh).float()
    Checkpoint.load(tmp_path / "c").apply(fresh, "flux")
    assert enabled_quantizers(fresh).keys() == enabled_quantizers(made.backbone).keys()
    branches = made.format == "nvfp4_svdquant"
    for path in layers_of(made.backbone):
        ours, theirs = linear(fresh, path).weight, linear(made.backbone, path).weight
        if branches:
            step = 2.0**-23 if dtype == torch.float32 else 2.0**-8
            assert (ours.float() - theirs).abs().max() <= 4 * step * theirs.abs().max()
        else:
            assert torch.equal(ours, theirs.to(dtype))
    output, expected = forward(fresh).float(), forward(made.backbone)
    if dtype == torch.float32 and not branches:
        assert torch.equal(output, expected)
    error = float((output - expected).norm() / expected.norm())
    assert error < ({torch.float32: 5e-3, torch.bfloat16: 0.1}[dtype])
    assert float((expected - plain).norm() / plain.norm()) > 1e-4


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_recipes_of_weights_are_what_torch_has_bit_for_bit(made: SimpleNamespace, dtype: torch.dtype) -> None:
    original, fresh = backbone_of(dtype), backbone_of(dtype)
    made.checkpoint.apply(fresh, "flux")
    changed = 0
    for path in layers_of(fresh):
        weight = linear(original, path).weight
        array = (
            weight.view(torch.int16).numpy().view(_numpy(dtype)) if dtype != torch.float32 else weight.numpy()
        )
        recipe = scaled_weight(Recipe.of_array(array), path, made.checkpoint)
        assert recipe.dtype == onnx_dtype(_numpy(dtype))
        expected = linear(fresh, path).weight
        assert np.array_equal(evaluate(recipe).astype(np.float32), expected.float().numpy()), path
        changed += not torch.equal(weight, expected)
    assert changed == (len(layers_of(fresh)) if made.format in SCALED else 0)


def _numpy(dtype: torch.dtype) -> Any:
    import ml_dtypes

    return np.dtype({torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}.get(dtype, np.float32))


@scaled
def test_a_fake_backbone_takes_fake_factors(made: SimpleNamespace) -> None:
    mode = FakeTensorMode()
    with mode:
        fake = diffusers.FluxTransformer2DModel(**CONFIG)
        made.checkpoint.apply(fake, "flux")
    for name, array in made.checkpoint.scaling.items():
        path, _, kind = name.rpartition(".")
        value = getattr(fake.get_submodule(path), kind)
        assert isinstance(value, FakeTensor)
        assert tuple(value.shape) == array.shape
    assert len(made.checkpoint.scaling) == len(layers_of(fake)) * (
        3 if made.format == "nvfp4_svdquant" else 1
    )


def test_formats_without_scaling_have_none() -> None:
    for format in ("fp8", "nvfp4"):
        backbone = _kept.setdefault(format, calibrated(format))
        assert not Checkpoint.from_backbone(backbone, family="flux", format=format).scaling


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the tensors of a checkpoint; the record keeps the hash of the old ones."""
    tensors = change(load_file(folder / "quantizers.safetensors"))
    save_file(tensors, folder / "quantizers.safetensors")


def renamed(tensors: dict[str, Any], name: str, new: str) -> dict[str, Any]:
    return {new if key == name else key: value for key, value in tensors.items()}


@pytest.mark.parametrize("made", ["nvfp4_svdquant"], indirect=True)
def test_damage_is_noticed(made: SimpleNamespace, tmp_path: Path) -> None:
    factor = next(n for n in made.checkpoint.scaling if n.endswith("pre_quant_scale"))
    for i, change in enumerate(
        (
            lambda t: {k: v for k, v in t.items() if k != factor},
            lambda t: renamed(t, factor, factor.replace("pre_quant_scale", "post_quant_scale")),
            lambda t: t | {factor: t[factor] * np.float32(1.01)},
        )
    ):
        folder = tmp_path / str(i)
        made.checkpoint.save(folder)
        Checkpoint.load(folder)
        rewrite(folder, change)
        with pytest.raises(DiffcError, match=r"damaged: quantizers\.safetensors is not the file"):
            Checkpoint.load(folder)
    strange = tmp_path / "strange"
    made.checkpoint.save(strange)
    rewrite(strange, lambda t: renamed(t, factor, factor.replace("pre_quant_scale", "post_quant_scale")))
    record = json.loads((strange / "checkpoint.json").read_text(encoding="utf-8"))
    record["tensors_sha256"] = hashlib.sha256((strange / "quantizers.safetensors").read_bytes()).hexdigest()
    (strange / "checkpoint.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(DiffcError, match=r"disagree on .*post_quant_scale"):
        Checkpoint.load(strange)


def test_modelopt_is_left_as_it_was() -> None:
    from modelopt.torch.quantization import model_calib

    from diffc.quantize.scaling import portable_scaling

    before = model_calib.svd, model_calib.apply_pre_quant_scale_and_smooth
    with pytest.raises(ZeroDivisionError), portable_scaling():  # noqa: PT012  # the error ends the block
        assert model_calib.svd is not before[0]
        raise ZeroDivisionError
    assert (model_calib.svd, model_calib.apply_pre_quant_scale_and_smooth) == before
