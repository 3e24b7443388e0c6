"""Modules of diffusers whose own code makes a worse graph: sizes that turn into constants, tables that are not exact.

The result is the same, bit for bit; the modules' own code runs everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from diffc.models.batched import FORWARDS


def rewrite_modules(backbone: nn.Module) -> None:
    """Replace the forward() of the modules of `backbone` that are listed here, in place."""
    for module in backbone.modules():
        make = REWRITES.get(type(module).__name__)
        if make is not None:
            module.forward = make(module)


def _chroma_modulation(module: Any) -> Callable[..., torch.Tensor]:
    """The input of Chroma's modulation: rows of time, guidance (zero) and position in the list of modulations.

    before: torch.tensor([0] * batch), which needs the batch as a number      after: zeros like the times
    """

    def forward(timestep: torch.Tensor) -> torch.Tensor:
        rows = module.mod_proj.shape[0]
        time = module.time_proj(timestep).to(timestep.dtype)
        guidance = module.guidance_proj(torch.zeros_like(timestep)).to(timestep.dtype)
        both = torch.cat([time, guidance], dim=1)[:, None].expand(-1, rows, -1)
        table = module.mod_proj.to(time.dtype)[None].expand(timestep.shape[0], -1, -1)
        return torch.cat([both, table], dim=-1).to(timestep.dtype)

    return forward


def _sinusoids(module: Any) -> Callable[..., torch.Tensor]:
    """The sinusoids of a time, with frequencies that are constants of the graph.

    before: exp(arange * factor) in the graph; two runtimes round it differently, and a time of 1000 makes a thousand
    times the difference of it      after: torch's own values of it
    """
    with unset_fake_temporarily():
        half = module.num_channels // 2
        exponent = -math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32)
        frequencies = torch.exp(exponent / (half - module.downscale_freq_shift))[None, :]

    def forward(timesteps: torch.Tensor) -> torch.Tensor:
        angles = module.scale * (timesteps[:, None].float() * frequencies)
        parts = [torch.sin(angles), torch.cos(angles)]
        found = torch.cat(parts[::-1] if module.flip_sin_to_cos else parts, dim=-1)
        return nn.functional.pad(found, (0, 1)) if module.num_channels % 2 else found

    return forward


REWRITES: Mapping[str, Callable[[Any], Callable[..., Any]]] = {
    **FORWARDS,
    "ChromaCombinedTimestepTextProjEmbeddings": _chroma_modulation,
    "Timesteps": _sinusoids,
}
"""Name of a module's class -> what makes its forward()."""
