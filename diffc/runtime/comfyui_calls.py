"""One denoising call of ComfyUI as a call of a compiled backbone, by family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffc.errors import DiffcError
from diffc.runtime.module import CompiledBackbone

PATCH = 2  # SD3 and FLUX take latents in patches of 2 x 2
FLUX_CHANNELS = 16


@dataclass(frozen=True)
class Call:
    """What ComfyUI gives for one denoising step, on the backbone's device: latents, times, text and conditions."""

    x: Tensor
    time: Tensor
    context: Tensor | None
    given: Mapping[str, Any]

    @property
    def pooled(self) -> Tensor:
        """`y`. Raises DiffcError without one."""
        if not isinstance(y := self.given.get("y"), Tensor):
            raise DiffcError(
                "ComfyUI gives no pooled text (y)",
                fix="encode the prompt with the CLIP of this model's family",
            )
        return y


Denoise = Callable[[CompiledBackbone, Call], Tensor]
"""One call of a backbone: the prediction in the shape of the latents."""


def unet(backbone: CompiledBackbone, call: Call) -> Tensor:
    """Of UNets that are conditioned on text alone."""
    return _first(backbone(call.x, call.time, encoder_hidden_states=call.context, return_dict=False))


def sdxl(backbone: CompiledBackbone, call: Call) -> Tensor:
    """Of SDXL: `y` begins with the pooled text, and `time_ids` [batch, 6] are the sizes as numbers."""
    width = int(backbone.config["projection_class_embeddings_input_dim"])
    pooled = width - 6 * int(backbone.config["addition_time_embed_dim"])
    added = {"text_embeds": call.pooled[:, :pooled], "time_ids": call.given["time_ids"]}
    found = backbone(
        call.x,
        call.time,
        encoder_hidden_states=call.context,
        added_cond_kwargs=added,
        return_dict=False,
    )
    return _first(found)


def sd3(backbone: CompiledBackbone, call: Call) -> Tensor:
    """Of SD3, whose latents are cut to whole patches."""
    x, rows, columns = _padded(call.x)
    found = backbone(
        hidden_states=x,
        encoder_hidden_states=call.context,
        pooled_projections=call.pooled,
        timestep=call.time,
        return_dict=False,
    )
    return _first(found)[..., :rows, :columns]


def flux(backbone: CompiledBackbone, call: Call) -> Tensor:
    """Of FLUX.1: latents as tokens of 2 x 2 patches, with their rows and columns."""
    x, rows, columns = _padded(call.x)
    context = call.context
    assert context is not None
    batch, channels, high, wide = x.shape
    down, across = high // PATCH, wide // PATCH
    tokens = x.reshape(batch, channels, down, PATCH, across, PATCH).permute(0, 2, 4, 1, 3, 5)
    guidance = {"guidance": call.given["guidance"]} if backbone.config["guidance_embeds"] else {}
    found = backbone(
        hidden_states=tokens.reshape(batch, down * across, -1),
        encoder_hidden_states=context,
        pooled_projections=call.pooled,
        timestep=call.time,
        img_ids=_positions(down, across, x.device),
        txt_ids=torch.zeros(context.shape[1], 3, device=x.device),
        **guidance,
        return_dict=False,
    )
    grid = _first(found).reshape(batch, down, across, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch, channels, high, wide)[..., :rows, :columns]


def _positions(down: int, across: int, device: torch.device) -> Tensor:
    """[tokens, 3]: zero, row and column of every patch, row by row."""
    grid = torch.zeros(down, across, 3, device=device)
    grid[..., 1] = torch.arange(down, device=device)[:, None]
    grid[..., 2] = torch.arange(across, device=device)[None, :]
    return grid.reshape(-1, 3)


def _padded(x: Tensor) -> tuple[Tensor, int, int]:
    """Latents of whole patches, going on at the other edge as ComfyUI's own models do, and their sizes before."""
    rows, columns = x.shape[-2:]
    if not (rows % PATCH or columns % PATCH):
        return x, rows, columns
    return pad(x, (0, -columns % PATCH, 0, -rows % PATCH), mode="circular"), rows, columns


def _first(found: Any) -> Tensor:
    """The prediction: the first of what a backbone returns as a tuple."""
    prediction: Tensor = found[0]
    return prediction
