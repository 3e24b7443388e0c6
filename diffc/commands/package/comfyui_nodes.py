"""A ComfyUI node that loads a backbone compiled by diffc as a MODEL. `diffc package --layout comfyui` copies this file.

Artifacts are the folders in `artifacts` beside this file, and those in ComfyUI's models/diffc.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import comfy.conds
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import folder_paths
import torch

from diffc.artifact.folder import Artifact
from diffc.backends.target import RUNTIMES
from diffc.errors import DiffcError
from diffc.runtime.comfyui import ComfyModel, Denoiser, comfy_model
from diffc.runtime.load import load

HERE = Path(__file__).resolve().parent
AUTOMATIC = "automatic"


def artifact_folders() -> dict[str, Path]:
    """Artifacts by name: those of this package, and those of models/diffc."""
    places = (Path(folder_paths.models_dir) / "diffc", HERE / "artifacts")
    found = (path for place in places for path in sorted(place.glob("*/manifest.json")))
    return {path.parent.name: path.parent for path in found}


class LoadDiffcBackbone:
    """Load an artifact; its output goes where that of a checkpoint's or diffusion model's loader goes."""

    RETURN_TYPES: ClassVar = ("MODEL",)
    FUNCTION: ClassVar = "load"
    CATEGORY: ClassVar = "loaders/diffc"
    DESCRIPTION: ClassVar = (
        "A diffusion backbone compiled by diffc. LoRA, ControlNet and patch nodes do not change it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node asks for: which artifact, and what runs it."""
        return {"required": {"artifact": (list(artifact_folders()),), "target": ([AUTOMATIC, *RUNTIMES],)}}

    def load(self, artifact: str, target: str = AUTOMATIC) -> tuple[Any]:
        """The MODEL. Raises DiffcError where the artifact is not there or does not run here."""
        folders = artifact_folders()
        if artifact not in folders:
            raise DiffcError(f"there is no artifact {artifact!r} in models/diffc", fix="reload the page")
        return (patcher(folders[artifact], None if target == AUTOMATIC else target),)


def patcher(folder: Path, target: str | None) -> Any:
    """A comfy.model_patcher.ModelPatcher around the compiled backbone in `folder`."""
    artifact = Artifact.load(folder)
    model, device = comfy_model(artifact), comfy.model_management.get_torch_device()
    size = sum(entry["bytes"] for entry in artifact.manifest["files"].values())
    comfy.model_management.free_memory(size, device)
    base = base_model(model, sampling_of(folder.name))
    base.diffusion_model = Denoiser(load(folder, target=target), model)
    offload = comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=offload, size=size)


def sampling_of(name: str) -> dict[str, Any]:
    """What the pipeline's scheduler says of an artifact of this package; empty for others: ComfyUI's own values."""
    file = HERE / "sampling.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return dict(found.get(name, {}))


def base_model(model: ComfyModel, sampling: dict[str, Any]) -> Any:
    """ComfyUI's model of that family without its network: conditions, latent format and sampling."""
    unet = {**model.unet_config, "disable_unet_model_creation": True}
    config = getattr(comfy.supported_models, model.supported)(unet)
    config.sampling_settings = {**config.sampling_settings, **sampling.get("settings", {})}
    kind = comfy.model_base.ModelType[sampling.get("model_type", model.model_type)]
    family = getattr(comfy.model_base, model.base)
    return (with_sizes(family) if model.sizes else family)(config, model_type=kind)


def with_sizes(family: Any) -> Any:
    """A class of comfy.model_base that gives the sizes of the picture as numbers beside their embedding."""

    class Sized(family):  # type: ignore[misc]  # a class of ComfyUI
        def extra_conds(self, **given: Any) -> dict[str, Any]:
            """The conditions of the family, and time_ids [1, 6]."""
            found: dict[str, Any] = super().extra_conds(**given)
            width, height = given.get("width", 768), given.get("height", 768)
            sizes = [height, width, given.get("crop_h", 0), given.get("crop_w", 0)]
            sizes += [given.get("target_height", height), given.get("target_width", width)]
            found["time_ids"] = comfy.conds.CONDRegular(torch.tensor([sizes], dtype=torch.int64))
            return found

    return Sized


NODE_CLASS_MAPPINGS = {"LoadDiffcBackbone": LoadDiffcBackbone}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadDiffcBackbone": "Load diffc backbone"}
