"""Modules of diffusers whose own code makes a worse graph: sizes that turn into constants, tables that are not exact.

The result is the same, bit for bit; the modules' own code runs everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

from diffc.models.batched import FORWARDS

if TYPE_CHECKING:
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

    The table of positions is float32 up to the end. A table that is cast by itself folds to rounded numbers, and the
    float32 twin of a 16-bit graph then differs from torch in float32.
    """
    import torch

    def forward(timestep: torch.Tensor) -> torch.Tensor:
        rows = module.mod_proj.shape[0]
        time = module.time_proj(timestep).to(timestep.dtype)
        guidance = module.guidance_proj(torch.zeros_like(timestep)).to(timestep.dtype)
        both = torch.cat([time, guidance], dim=1)[:, None].expand(-1, rows, -1)
        table = module.mod_proj[None].expand(timestep.shape[0], -1, -1)
        return torch.cat([both.to(table.dtype), table], dim=-1).to(timestep.dtype)

    return forward


def _sinusoids(module: Any) -> Callable[..., torch.Tensor]:
    """The sinusoids of a time, with frequencies that are constants of the graph.

    before: exp(arange * factor) in the graph; two runtimes round it differently, and a time of 1000 makes a thousand
    times the difference of it      after: torch's own values of it
    """
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        half = module.num_channels // 2
        exponent = -math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32)
        frequencies = torch.exp(exponent / (half - module.downscale_freq_shift))[None, :]

    def forward(timesteps: torch.Tensor) -> torch.Tensor:
        angles = module.scale * (timesteps[:, None].float() * frequencies)
        parts = [torch.sin(angles), torch.cos(angles)]
        found = torch.cat(parts[::-1] if module.flip_sin_to_cos else parts, dim=-1)
        return torch.nn.functional.pad(found, (0, 1)) if module.num_channels % 2 else found

    return forward


def _qwen_rotary(module: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Rotary factors of Qwen-Image: of the patches of every image, centred in rows and columns, then of the prompt.

    before: slices of two tables, at int(number of tokens)      after: rows of one table at positions, with free sizes
    """
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        table = torch.view_as_real(
            torch.cat([module.neg_freqs, module.pos_freqs]).to(torch.complex64)
        ).clone()
        zero = len(module.neg_freqs)
    widths = [width // 2 for width in module.axes_dim]

    def at(axis: int, positions: torch.Tensor) -> torch.Tensor:
        start = sum(widths[:axis])
        return table[:, start : start + widths[axis]][zero + positions]

    def centred(size: Any) -> torch.Tensor:
        return torch.arange(size) - ((size - size // 2) if module.scale_rope else 0)

    def of_image(number: int, frames: Any, height: Any, width: Any) -> torch.Tensor:
        parts = [
            at(0, number + torch.arange(frames))[:, None, None].expand(-1, height, width, -1, -1),
            at(1, centred(height))[None, :, None].expand(frames, -1, width, -1, -1),
            at(2, centred(width))[None, None].expand(frames, height, -1, -1, -1),
        ]
        return torch.cat(parts, dim=3).flatten(0, 2)

    def forward(
        video_fhw: Any, device: Any = None, max_txt_seq_len: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        del device
        shapes = video_fhw[0] if isinstance(video_fhw, list) else video_fhw
        shapes = shapes if isinstance(shapes, list) else [shapes]
        images = torch.cat([of_image(n, *shape) for n, shape in enumerate(shapes)])
        sides = [side // 2 if module.scale_rope else side for shape in shapes for side in shape[1:]]
        places = reduce(torch.sym_max, sides) + torch.arange(max_txt_seq_len)
        text = torch.cat([at(axis, places) for axis in range(len(widths))], dim=1)
        return torch.view_as_complex(images), torch.view_as_complex(text)

    return forward


REWRITES: Mapping[str, Callable[[Any], Callable[..., Any]]] = {
    **FORWARDS,
    "ChromaCombinedTimestepTextProjEmbeddings": _chroma_modulation,
    "Timesteps": _sinusoids,
    "QwenEmbedRope": _qwen_rotary,
}
"""Name of a module's class -> what makes its forward()."""
