"""`diffc package --layout comfyui`: the node is installed into a stand-in of ComfyUI, which denoises once with it."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import diffc
from diffc.artifact.folder import Artifact
from diffc.cli.main import run
from diffc.commands.package.comfyui import sampling_of
from diffc.commands.package.request import PackageRequest
from diffc.commands.package.run import package
from diffc.errors import DiffcError, UsageError
from diffc.runtime.comfyui import comfy_model
from tests import comfy_stand_in
from tests.conftest import Cells
from tests.runtime.test_load import SMALL

SIGMA = {"digits-sdxl": 3.0, "digits-sd3": 0.7, "digits-flux": 0.7}


@contextmanager
def node_package(folder: Path, models: Path) -> Iterator[ModuleType]:
    """The package as ComfyUI imports it: by its path, with its siblings reachable relatively."""
    spec = importlib.util.spec_from_file_location(
        "custom_node", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with comfy_stand_in.installed(models):
        sys.modules["custom_node"] = module
        spec.loader.exec_module(module)
        yield module
        for name in ("custom_node", "custom_node.nodes"):
            del sys.modules[name]


def load(module: ModuleType, artifact: str, target: str) -> Any:
    """What a workflow does with the node."""
    node = module.NODE_CLASS_MAPPINGS["LoadDiffcBackbone"]
    asked = node.INPUT_TYPES()["required"]
    assert artifact in asked["artifact"][0]
    assert target in asked["target"][0]
    (made,) = getattr(node(), node.FUNCTION)(artifact=artifact, target=target)
    return made


def denoised(made: Any, x: Tensor, sigma: float, text: Tensor, pooled: Tensor, **given: Any) -> Tensor:
    """One call of a sampler: conditions, then the model."""
    model = made.load()
    conditions = model.extra_conds(cross_attn=text, pooled_output=pooled, **given)
    kwargs = {k: v.cond.expand(len(x), *v.cond.shape[1:]) for k, v in conditions.items()}
    result: Tensor = model.apply_model(
        x, torch.full((len(x),), sigma), transformer_options={"cond_or_uncond": [0, 1]}, **kwargs
    )
    return result


def expected(module: Any, name: str, x: Tensor, sigma: float, text: Tensor, pooled: Tensor) -> Tensor:
    """The same as diffusers' pipelines call the backbone."""
    if name == "digits-sdxl":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        noise = ((1 - (1 - betas).cumprod(0)) / (1 - betas).cumprod(0)).sqrt()
        step = int((noise.log() - torch.tensor(sigma).log()).abs().argmin())
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]] * len(x))}
        scaled = x / (sigma**2 + 1) ** 0.5
        noise_in_x: Tensor = module(scaled, step, encoder_hidden_states=text, added_cond_kwargs=added)[0]
        return x - sigma * noise_in_x
    conditions = {"encoder_hidden_states": text, "pooled_projections": pooled}
    if name == "digits-sd3":
        time = torch.full((len(x),), 1000 * sigma)
        velocity: Tensor = module(hidden_states=x, timestep=time, **conditions)[0]
        return x - sigma * velocity
    from diffusers import FluxPipeline

    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    packed = FluxPipeline._pack_latents(x, len(x), x.shape[1], 2 * rows, 2 * columns)
    found = module(
        hidden_states=packed,
        timestep=torch.full((len(x),), sigma),
        guidance=torch.full((len(x),), 2.0),
        img_ids=FluxPipeline._prepare_latent_image_ids(len(x), rows, columns, "cpu", torch.float32),
        txt_ids=torch.zeros(text.shape[1], 3),
        **conditions,
    )[0]
    return x - sigma * FluxPipeline._unpack_latents(found, 16 * rows, 16 * columns, 8)


def drawn(module: Any, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of 64 x 96 px for two images, text, pooled text."""
    config, seed = module.config, torch.Generator().manual_seed(5)
    channels = 4 if name == "digits-sdxl" else 16
    if name == "digits-sdxl":
        width = config["cross_attention_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    else:
        width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
    shapes = ((2, channels, 8, 12), (2, 20, width), (2, pooled))
    x, text, together = (torch.randn(shape, generator=seed) for shape in shapes)
    return x, text, together


@pytest.mark.parametrize(
    "name", [name if name == "digits-sd3" else pytest.param(name, marks=pytest.mark.slow) for name in SIGMA]
)
def test_the_node_denoises_as_the_module_does(name: str, compiled: Cells, tmp_path: Path) -> None:
    artifact = compiled(name, "none", **SMALL).folder
    folder = tmp_path / "custom_nodes" / "mine"
    assert run(["package", str(artifact), "--layout", "comfyui", "-o", str(folder)]) == 0
    comfy_stand_in.freed.clear()
    with node_package(folder, tmp_path / "models") as module, diffc.load(artifact) as reference:
        made = load(module, f"{name}-none", "ort")
        x, text, pooled = drawn(reference, name)
        sizes = {"width": 96, "height": 64, "guidance": 2.0}
        got = denoised(made, x, SIGMA[name], text, pooled, **sizes)
        want = expected(reference, name, x, SIGMA[name], text, pooled)
        assert torch.allclose(got, want, atol=1e-5)
        assert not torch.allclose(got[:1], want[1:], atol=0.1)
        other = denoised(made, x, SIGMA[name], text.roll(1, 0), pooled, **sizes)
        assert not torch.allclose(other, want, atol=1e-3)
        ((required, _),) = comfy_stand_in.freed
        assert (
            required == made.size > (folder / "artifacts" / f"{name}-none" / "model.onnx_data").stat().st_size
        )
        model = made.load()
        assert model.state_dict().keys() == set()
        with pytest.raises(DiffcError, match="takes no ControlNet"):
            model.diffusion_model(x, torch.ones(2), context=text, control={"output": []}, y=pooled)
        with pytest.raises(DiffcError, match="patch of attention"):
            model.diffusion_model(
                x, torch.ones(2), context=text, transformer_options={"patches": {"attn1": [1]}}
            )


def test_odd_latents_are_padded_and_cut(compiled: Cells, tmp_path: Path) -> None:
    artifact = compiled("digits-sd3", "none", **SMALL).folder
    package(PackageRequest(artifact, tmp_path / "node", "comfyui"))
    (tmp_path / "models" / "diffc").mkdir(parents=True)
    (tmp_path / "node" / "artifacts" / "digits-sd3-none").rename(tmp_path / "models" / "diffc" / "moved")
    with node_package(tmp_path / "node", tmp_path / "models") as module:
        made = load(module, "moved", "automatic")
        x, text, pooled = drawn(made.model.diffusion_model.backbone, "digits-sd3")
        got = denoised(made, x[..., :11], 0.7, text, pooled)
        assert got.shape == (2, 16, 8, 11)
        wrapped = torch.cat([x[..., :11], x[..., :1]], dim=-1)
        assert torch.allclose(got, denoised(made, wrapped, 0.7, text, pooled)[..., :11], atol=1e-6)
        with pytest.raises(DiffcError, match="no artifact 'gone'"):
            module.NODE_CLASS_MAPPINGS["LoadDiffcBackbone"]().load("gone")


@pytest.mark.slow
def test_the_folder_holds_what_the_registry_asks_for(compiled: Cells, tmp_path: Path) -> None:
    artifact = compiled("digits-sdxl", "none", **SMALL).folder
    made = package(PackageRequest(artifact, tmp_path / "node", "comfyui", target="ort"))
    assert "custom_nodes" in made.how
    project = tomllib.loads((tmp_path / "node" / "pyproject.toml").read_text())
    assert project["project"]["name"] == "diffc-digits-sdxl-none"
    assert "onnxruntime==1.31.1" in project["project"]["dependencies"]
    assert set(project["tool"]["comfy"]) == {"PublisherId", "DisplayName"}
    inner = Artifact.load(tmp_path / "node" / "artifacts" / "digits-sdxl-none")
    inner.verify()
    assert not (inner.folder / "checkpoint").exists()
    sampling = json.loads((tmp_path / "node" / "sampling.json").read_text())["digits-sdxl-none"]
    assert sampling["model_type"] == "EPS"
    assert sampling["settings"]["timesteps"] == 1000


@pytest.mark.parametrize(
    ("scheduler", "found"),
    [
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
         {"model_type": "V_PREDICTION", "settings": {"zsnr": True}}),
        ({"beta_schedule": "linear", "beta_end": 0.02},
         {"model_type": "EPS", "settings": {"beta_schedule": "sqrt_linear", "linear_end": 0.02}}),
        ({}, {"model_type": "EPS", "settings": {}}),
    ],
)  # fmt: skip
def test_the_scheduler_says_how_to_sample(scheduler: dict[str, Any], found: dict[str, Any]) -> None:
    unet = comfy_model(backbone("sdxl", SDXL))
    assert sampling_of(scheduler, unet) == found
    with pytest.raises(DiffcError, match="prediction_type='sample'"):
        sampling_of({"prediction_type": "sample"}, unet)


def test_a_fixed_shift_is_taken_for_sd3_alone() -> None:
    sd3, flux = comfy_model(backbone("sd3", SD3)), comfy_model(backbone("flux", FLUX))
    assert sampling_of({"shift": 2.0}, sd3) == {"settings": {"shift": 2.0}}
    assert sampling_of({"shift": 2.0, "use_dynamic_shifting": True}, sd3) == {}
    assert sampling_of({"shift": 2.0}, flux) == {}


SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "patch_size": 2,
    "sample_size": 64,
    "pos_embed_max_size": 96,
}
FLUX = {**SD3, "in_channels": 64, "guidance_embeds": False}
SDXL = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "block_out_channels": [320],
}


def backbone(family: str | None, config: dict[str, Any]) -> Artifact:
    """An artifact of which nothing but its family and config is looked at."""
    return Artifact(Path("somewhere"), {"model": {"name": "x", "family": family, "config": config}})


def test_models_that_the_node_cannot_feed_are_refused() -> None:
    assert comfy_model(backbone("flux", FLUX)).supported == "FluxSchnell"
    assert comfy_model(backbone("flux", {**FLUX, "guidance_embeds": True})).supported == "Flux"
    cases = {
        "is of family qwenimage": backbone("qwenimage", {}),
        "is of no family": backbone(None, {}),
        "takes 384 channels": backbone("flux", {**FLUX, "in_channels": 384}),
        "takes 9 channels": backbone("sdxl", {**SDXL, "in_channels": 9}),
        "has an input timestep_cond": backbone("sdxl", {**SDXL, "time_cond_proj_dim": 256}),
    }
    for match, artifact in cases.items():
        with pytest.raises(DiffcError, match=match):
            comfy_model(artifact)


def test_options_of_the_rest_of_the_pipeline_are_refused(compiled: Cells, tmp_path: Path) -> None:
    artifact = compiled("digits-sd3", "none", **SMALL).folder
    for layout in ("comfyui", "triton"):
        with pytest.raises(UsageError, match="takes no --dtype"):
            package(PackageRequest(artifact, tmp_path / "out", layout, dtype="float32"))
    assert not (tmp_path / "out").exists()
