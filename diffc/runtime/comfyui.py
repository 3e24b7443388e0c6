"""A compiled backbone as ComfyUI's samplers call a model. Nothing here imports ComfyUI: the node of
`diffc package --layout comfyui` does.

ComfyUI calls `diffusion_model(x, t, context=, control=, transformer_options=, **conditions)`: x are latents [batch,
channels, rows, columns], t [batch] is on the scale that the model was trained with (the number of a step for UNets,
1000 sigma for SD3, sigma for FLUX), `y` is the pooled text, of SDXL with the sizes embedded behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffc.artifact.folder import Artifact
from diffc.errors import DiffcError, UnsupportedError
from diffc.models.registry import family_of_manifest
from diffc.runtime.comfyui_calls import FLUX_CHANNELS, PATCH, Call, Denoise, flux, sd3, sdxl, unet
from diffc.runtime.module import CompiledBackbone


@dataclass(frozen=True)
class ComfyModel:
    """How ComfyUI sees a backbone: names in comfy.supported_models, comfy.model_base and its ModelType.

    `unet_config` are the entries that these read, `sizes` says that the sizes of the picture are a condition.
    """

    supported: str
    base: str
    model_type: str
    denoise: Denoise
    unet_config: Mapping[str, Any] = field(default_factory=dict)
    sizes: bool = False


def comfy_model(artifact: Artifact) -> ComfyModel:
    """What ComfyUI has to know of an artifact's backbone.

    Raises UnsupportedError for a family, or an input of it, for which ComfyUI gives no condition.
    """
    model = artifact.manifest["model"]
    name = model.get("family")
    if name not in _FAMILIES:
        raise UnsupportedError(
            f"{artifact.folder} is of {f'family {name}' if name else 'no family that diffc knows'}, and the node knows"
            f" ComfyUI's conditions of {', '.join(_FAMILIES)} alone",
            fix="run it in its diffusers pipeline: diffc.load",
        )
    family, config = family_of_manifest(model), model["config"]
    found = _FAMILIES[name](config)
    known = _INPUTS[name]
    if extra := [item.name for item in family.inputs(config) if item.name not in known]:
        raise UnsupportedError(
            f"this {name} backbone has an input {extra[0]}, for which ComfyUI gives no condition",
            fix="run it in its diffusers pipeline: diffc.load",
        )
    return found


class Denoiser(nn.Module):
    """What stands in the place of `diffusion_model`. It has no parameters, and ComfyUI moves none of it.

    ControlNets and patches of blocks or attention act inside of a torch model: they raise DiffcError.
    """

    def __init__(self, backbone: CompiledBackbone, model: ComfyModel):
        super().__init__()
        # Not as a submodule: ComfyUI moves a model with .to(), and a compiled backbone stays where it is.
        self._held, self._denoise = (backbone,), model.denoise

    @property
    def backbone(self) -> CompiledBackbone:
        """The compiled backbone."""
        return self._held[0]

    @property
    def dtype(self) -> torch.dtype:
        """The type that ComfyUI casts latents and conditions to."""
        return self.backbone.dtype

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **conditions: Any,
    ) -> Tensor:
        """The prediction for latents [batch, channels, rows, columns], in their shape and on their device."""
        options = transformer_options or {}
        _refuse(control, options, conditions)
        device = self.backbone.device
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in conditions.items()}
        text = None if context is None else context.to(device)
        branch = "-".join(map(str, options.get("cond_or_uncond", ())))
        with self.backbone.cache_context(branch):
            found = self._denoise(self.backbone, Call(x.to(device), timesteps.to(device), text, given))
        return found.to(x.device)


def _refuse(control: Any, options: Mapping[str, Any], conditions: Mapping[str, Any]) -> None:
    """Raise DiffcError for what a compiled graph cannot take part in; leaving it out would change the picture."""
    wrong = {
        "a ControlNet": control is not None,
        "a patch of attention or blocks": bool(options.get("patches") or options.get("patches_replace")),
        "reference latents": bool(conditions.get("ref_latents")),
    }
    if told := [name for name, is_given in wrong.items() if is_given]:
        raise DiffcError(
            f"a compiled backbone takes no {told[0].removeprefix('a ')}: its graph has no place for it",
            fix="take the node out of the workflow, or run the torch model",
        )


def _of_unet(config: Mapping[str, Any]) -> ComfyModel:
    _check_channels(config, 4)
    kind = "SD20" if config["cross_attention_dim"] == 1024 else "SD15"
    return ComfyModel(kind, "BaseModel", "EPS", unet, {"in_channels": 4})


def _of_sdxl(config: Mapping[str, Any]) -> ComfyModel:
    _check_channels(config, 4)
    return ComfyModel("SDXL", "SDXL", "EPS", sdxl, {"in_channels": 4}, sizes=True)


def _of_sd3(config: Mapping[str, Any]) -> ComfyModel:
    _check_channels(config, 16)
    return ComfyModel("SD3", "SD3", "FLOW", sd3, {"in_channels": 16})


def _of_flux(config: Mapping[str, Any]) -> ComfyModel:
    _check_channels(config, FLUX_CHANNELS * PATCH**2)
    channels = {"in_channels": FLUX_CHANNELS, "out_channels": FLUX_CHANNELS}
    if config["guidance_embeds"]:
        return ComfyModel("Flux", "Flux", "FLUX", flux, channels)
    return ComfyModel("FluxSchnell", "Flux", "FLOW", flux, channels)


def _check_channels(config: Mapping[str, Any], expected: int) -> None:
    """Raise UnsupportedError for a backbone that takes masks or pictures beside the latents."""
    if config["in_channels"] != expected:
        raise UnsupportedError(
            f"this backbone takes {config['in_channels']} channels, and its latents have {expected}: the node gives no"
            " masks or pictures beside them",
            fix="run it in its diffusers pipeline: diffc.load",
        )


_FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], ComfyModel]] = {
    "sd": _of_unet,
    "sdxl": _of_sdxl,
    "sd3": _of_sd3,
    "flux": _of_flux,
}
_TRANSFORMER = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
_INPUTS: Mapping[str, tuple[str, ...]] = {
    "sd": ("sample", "timestep", "encoder_hidden_states"),
    "sdxl": ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"),
    "sd3": _TRANSFORMER,
    "flux": (*_TRANSFORMER, "img_ids", "txt_ids", "guidance"),
}
