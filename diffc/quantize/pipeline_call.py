"""The arguments of one call of a diffusers pipeline: prompts, and whatever else its class asks for.

Pipelines that paint over an image (image to image, inpainting, ControlNets) are given images and masks that are made
here: seeded, smooth with some grain, never flat.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError, UsageError

if TYPE_CHECKING:
    import torch

_IMAGES = ("image", "control_image")
_MASK = "mask_image"
IMAGE_ARGUMENTS = (*_IMAGES, _MASK)
"""Arguments that hold images; `usual` of `call_arguments` may say what they are."""
_COARSE = 8
"""Cells of the coarse pattern in an image, along each side."""


def call_arguments(
    call: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    height: int,
    width: int,
    guidance: float | None = None,
    usual: Mapping[str, Any],
    negative_prompt: str = "",
) -> dict[str, Any]:
    """The arguments of `call`, a pipeline's __call__, for latents of `prompts`, image n of the seed `seeds[n]`.

    `usual` are the family's own arguments; `guidance` replaces theirs. Sizes are in pixels. Raises DiffcError for a
    pipeline that asks for something that is not made here, UsageError for a setting that it does not take.
    """
    import torch

    parameters = inspect.signature(call).parameters
    check_settings(call, guidance=guidance, negative_prompt=negative_prompt)
    given: dict[str, Any] = {
        "prompt": list(prompts),
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "num_inference_steps": steps,
        "output_type": "latent",
        # Image to image has no height: the image tells.
        **{n: value for n, value in {**usual, "height": height, "width": width}.items() if takes(call, n)},
    }
    if guidance is not None:
        given["guidance_scale"] = guidance
    if negative_prompt:
        given["negative_prompt"] = [negative_prompt] * len(prompts)
    for name in IMAGE_ARGUMENTS:
        if name in parameters and name not in usual:
            given[name] = _mask(seeds, height, width) if name == _MASK else _images(seeds, height, width)
    if "strength" in parameters:  # of the steps, image to image runs this share, the last ones; one at least
        given["strength"] = max(parameters["strength"].default, 1 / steps)
    _require_all(parameters, given)
    return given


def steps_of(pipe: Any, arguments: Mapping[str, Any]) -> int:
    """How often a call with these arguments runs the backbone for each image: the timesteps of its scheduler."""
    steps = int(arguments["num_inference_steps"])
    pipe.scheduler.set_timesteps(steps)  # schedulers of second order call the backbone more often than that
    return max(1, int(len(pipe.scheduler.timesteps) * min(1.0, arguments.get("strength", 1.0))))


def check_settings(call: Any, *, guidance: float | None, negative_prompt: str) -> None:
    """Raise UsageError for a setting that a pipeline with this __call__ does not take."""
    if guidance is not None and not takes(call, "guidance_scale"):
        raise UsageError("this pipeline takes no guidance scale", fix="leave --guidance out")
    if negative_prompt and not takes(call, "negative_prompt"):
        raise UsageError("this pipeline takes no negative prompt", fix="leave --negative-prompt out")


def takes(call: Any, name: str) -> bool:
    """Whether a function has a parameter of that name, or takes all names."""
    parameters = inspect.signature(call).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def _require_all(parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    """Raise DiffcError that names what the pipeline asks for and is not given, or does not take."""
    kinds = {p.kind for p in parameters.values()}
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = {name: p for name, p in parameters.items() if p.kind not in open_ended and name != "self"}
    lacking = [name for name, p in named.items() if p.default is p.empty and name not in given]
    if lacking:
        what = f"it asks for {', '.join(lacking)}"
    elif "prompt" not in named and inspect.Parameter.VAR_KEYWORD not in kinds:
        what = "it takes no prompt"
    else:
        return
    raise DiffcError(
        f"this pipeline cannot be calibrated on prompts: {what}",
        fix="give a pipeline that paints from a prompt, --from-checkpoint with an earlier calibration, or"
        " --calibrate synthetic",
    )


def _images(seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
    """Images [N, 3, height, width] in 0..1: a coarse pattern of colours, and grain."""
    import torch

    images = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        coarse = torch.rand((1, 3, _COARSE, _COARSE), generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        images.append(0.9 * smooth + 0.1 * torch.rand((1, 3, height, width), generator=generator))
    return torch.cat(images)


def _mask(seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
    """Masks [N, 1, height, width]: 1, to be painted, in the middle half of each side."""
    import torch

    mask = torch.zeros((len(seeds), 1, height, width))
    mask[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
    return mask
