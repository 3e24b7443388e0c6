"""Reads a released model by the short name that ModelOpt's scripts have for it: the id on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.sources import hub
from diffc.models.sources.source import HubOptions, ModelSource, Reader

RELEASED: Mapping[str, str] = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "sd2.1": "stabilityai/stable-diffusion-2-1",
    "sd2.1-base": "stabilityai/stable-diffusion-2-1-base",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux2-dev": "black-forest-labs/FLUX.2-dev",
    "ltx-video-dev": "Lightricks/LTX-Video-0.9.7-dev",
    "ltx-2": "Lightricks/LTX-2",
    "wan2.2-t2v-14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "wan2.2-t2v-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "qwen-image": "Qwen/Qwen-Image",
}
"""Name in ModelOpt's `quantize.py --model`, or in `diffc models list` -> id on the hub."""


def id_of(name: str) -> str | None:
    """The id on the hub that a short name stands for; capitals do not matter. None for any other name."""
    return RELEASED.get(name.lower())


def _declines(model: str) -> str | None:
    if id_of(model) is not None:
        return None
    return f"{model!r} is not one of {', '.join(RELEASED)}"


def _open(options: HubOptions, model: str) -> ModelSource:
    name = id_of(model) or model
    try:
        return hub.reader(options).open(name)
    except UnsupportedError:
        raise
    except DiffcError as error:
        what = f"{model} stands for {name} of the Hugging Face hub: {error.what}"
        raise DiffcError(what, fix=error.fix) from error


def reader(options: HubOptions) -> Reader:
    """The reader of short names; `options` are those of the hub."""
    expects = "the short name of a released model (flux-dev, sdxl-1.0)"
    return Reader("released model", expects, _declines, partial(_open, options))
