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


def _mochi_attention(module: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Attention of Mochi over the tokens of a video and of its prompt.

    before: per video, the tokens that its prompt has, taken out of the batch      after: a mask over all tokens
    """
    import torch

    def projected(
        q: Any, k: Any, v: Any, norm_q: Any, norm_k: Any, x: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        heads = [layer(x).unflatten(2, (module.heads, -1)) for layer in (q, k, v)]
        return norm_q(heads[0]), norm_k(heads[1]), heads[2]

    def turned(x: torch.Tensor, factors: Any) -> torch.Tensor:
        if factors is None:
            return x
        cos, sin = factors
        even, odd = x[..., 0::2].float(), x[..., 1::2].float()
        parts = [(even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)]
        return torch.stack(parts, dim=-1).flatten(-2)

    def forward(
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        m = module
        video = projected(m.to_q, m.to_k, m.to_v, m.norm_q, m.norm_k, hidden_states)
        video = (turned(video[0], image_rotary_emb), turned(video[1], image_rotary_emb), video[2])
        added = (m.add_q_proj, m.add_k_proj, m.add_v_proj, m.norm_added_q, m.norm_added_k)
        text = projected(*added, encoder_hidden_states)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(video, text, strict=True))
        tokens, seen = hidden_states.shape[1], attention_mask.bool()
        mask = torch.nn.functional.pad(seen, (tokens, 0), value=True)[:, None, None]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.transpose(1, 2).flatten(2, 3)
        found = m.to_out[1](m.to_out[0](out[:, :tokens]))
        rest = out[:, tokens:] * seen[..., None].to(out.dtype)
        return found, m.to_add_out(rest) if hasattr(m, "to_add_out") else rest

    return forward


def _mochi_rotary(module: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Rotary factors of Mochi: rows and columns lie centred in a square of one area, whatever their number.

    before: Python numbers of the size, which a trace keeps as they are      after: tensors of the size
    """
    import torch

    def centred(size: Any, scale: torch.Tensor) -> torch.Tensor:
        return (torch.arange(size) + 0.5 - torch.ones(size).sum() / 2) * scale

    def forward(
        pos_frequencies: torch.Tensor,
        num_frames: Any,
        height: Any,
        width: Any,
        device: Any = None,
        dtype: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        del device, dtype
        scale = (module.target_area / (torch.ones(height).sum() * torch.ones(width).sum())) ** 0.5
        sizes = (num_frames, height, width)
        axes = (torch.arange(num_frames).float(), centred(height, scale), centred(width, scale))
        shaped = (axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None])
        places = torch.stack([axis.expand(sizes) for axis in shaped], dim=-1).reshape(-1, 3)
        angles = (places[:, :, None, None] * pos_frequencies.float()[None]).sum(1)
        return torch.cos(angles), torch.sin(angles)

    return forward


REWRITES: Mapping[str, Callable[[Any], Callable[..., Any]]] = {
    **FORWARDS,
    "ChromaCombinedTimestepTextProjEmbeddings": _chroma_modulation,
    "MochiAttention": _mochi_attention,
    "MochiRoPE": _mochi_rotary,
    "Timesteps": _sinusoids,
    "QwenEmbedRope": _qwen_rotary,
}
"""Name of a module's class -> what makes its forward()."""
