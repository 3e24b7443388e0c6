"""Modules of diffusers that torch.export makes constants of, written so that their sizes stay symbols.

The result is the same, bit for bit; the modules' own code runs everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


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


REWRITES: Mapping[str, Callable[[Any], Callable[..., Any]]] = {
    "ChromaCombinedTimestepTextProjEmbeddings": _chroma_modulation,
}
"""Name of a module's class -> what makes its forward()."""
