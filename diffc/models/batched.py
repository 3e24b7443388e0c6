"""Backbones of diffusers that take their batch apart in Python, written for the whole batch at once.

Their own forward() goes through the images one by one, with numbers of tokens that it reads out of tensors or off
lists; a graph can do neither. What stands here computes the same with masks: tokens that a shorter prompt does not
have are masked keys, and nobody reads what they give as queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffc.models.lists import Lists

if TYPE_CHECKING:
    from torch import Tensor

Forward = Callable[..., Any]


def _tables(complex_tables: Sequence[Tensor]) -> list[Tensor]:
    """Rotary tables [positions, channels / 2] as pairs of float32 numbers in a last axis."""
    import torch

    return [torch.view_as_real(table.to(torch.complex64)).clone() for table in complex_tables]


def _rotary(tables: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
    """Complex factors [batch, tokens, channels / 2]: those of every axis at its positions [batch, tokens]."""
    import torch

    parts = [table[place] for table, place in zip(tables, positions, strict=True)]
    return torch.view_as_complex(torch.cat(parts, dim=-2))


def _grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch, row by row."""
    import torch

    row = torch.arange(rows)[:, None].expand(rows, columns).reshape(-1)
    column = torch.arange(columns)[None, :].expand(rows, columns).reshape(-1)
    return row, column


def _lumina2(model: Any) -> Forward:
    """Lumina 2: the tokens of a prompt, then those of the image; positions go on after the prompt's last token.

    before: per image, its own number of tokens, which is the sum of its mask      after: a mask over all of them
    """
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        tables = _tables(model.rope_embedder.freqs_cis)
    patch = model.config.patch_size

    def forward(
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        batch, channels, height, width = hidden_states.shape
        rows, columns = height // patch, width // patch
        times, text = model.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
        seen = encoder_attention_mask.bool()
        tokens = seen.shape[1]
        place, zero = (
            torch.arange(tokens).expand(batch, tokens),
            torch.zeros(batch, tokens, dtype=torch.int64),
        )
        of_text = _rotary(tables, (place, zero, zero))
        row, column = (axis.expand(batch, rows * columns) for axis in _grid(rows, columns))
        of_image = _rotary(tables, (seen.sum(1, keepdim=True).expand(batch, rows * columns), row, column))
        patches = hidden_states.view(batch, channels, rows, patch, columns, patch)
        image = model.x_embedder(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        for layer in model.context_refiner:
            text = layer(text, seen, of_text)
        for layer in model.noise_refiner:
            image = layer(image, None, of_image, times)
        joint, rotary = torch.cat([text, image], dim=1), torch.cat([of_text, of_image], dim=1)
        mask = torch.nn.functional.pad(seen, (0, rows * columns), value=True)
        for layer in model.layers:
            joint = layer(joint, mask, rotary, times)
        pixels = model.norm_out(joint, times)[:, tokens:]
        pixels = pixels.reshape(batch, rows, columns, patch, patch, model.out_channels)
        return _result(pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3), return_dict)

    return forward


def _sinusoids(times: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines, then sines, of times [batch] at frequencies that are constants of the graph."""
    import torch

    angles = times[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


_STEP = 32
"""Z-Image fills up the tokens of an image and of a prompt to a multiple of this with learned ones."""


def _z_image(model: Any) -> Forward:
    """Z-Image: the tokens of an image, then those of its prompt, each filled up to a multiple of 32.

    before: lists of images and of prompts, each prompt of its own length
    after: `x` [batch, channels, frames, height, width], `cap_feats` [batch, tokens, width] with zeros at the ends of
    shorter prompts, and `cap_feats_lengths` [batch]: how many tokens each has
    """
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        embedder = model.rope_embedder
        made = embedder.freqs_cis or embedder.precompute_freqs_cis(
            embedder.axes_dims, embedder.axes_lens, theta=embedder.theta
        )
        tables = _tables(made)
        half = model.t_embedder.frequency_embedding_size // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)

    def forward(
        x: Tensor,
        t: Tensor,
        cap_feats: Tensor,
        cap_feats_lengths: Tensor,
        return_dict: bool = True,
        patch_size: int = 2,
        f_patch_size: int = 1,
        **_: Any,
    ) -> Any:
        batch, channels, frames, height, width = x.shape
        sizes = (frames // f_patch_size, height // patch_size, width // patch_size)
        kind = f"{patch_size}-{f_patch_size}"
        times = model.t_embedder.mlp(_sinusoids(t * model.t_scale, frequencies).to(x.dtype)).type_as(x)
        lengths = cap_feats_lengths.to(torch.int64)[:, None]
        filled = (lengths + _STEP - 1) // _STEP * _STEP
        # the prompt
        text, of_text, seen = _z_text(model, tables, cap_feats, lengths, filled)
        # the image
        patches = x.view(batch, channels, sizes[0], f_patch_size, sizes[1], patch_size, sizes[2], patch_size)
        patches = patches.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)
        image, of_image = _z_image_tokens(model, tables, patches, sizes, filled, kind)
        for layer in model.noise_refiner:
            image = layer(image, None, of_image, times)
        for layer in model.context_refiner:
            text = layer(text, seen, of_text)
        joint, rotary = torch.cat([image, text], dim=1), torch.cat([of_image, of_text], dim=1)
        mask = torch.nn.functional.pad(seen, (image.shape[1], 0), value=True)
        for layer in model.layers:
            joint = layer(joint, mask, rotary, times)
        pixels = model.all_final_layer[kind](joint, c=times)[:, : sizes[0] * sizes[1] * sizes[2]]
        pixels = pixels.reshape(batch, *sizes, f_patch_size, patch_size, patch_size, model.out_channels)
        pixels = pixels.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(
            batch, model.out_channels, frames, height, width
        )
        return _result(pixels, return_dict)

    return forward


def _z_text(
    model: Any, tables: Sequence[Tensor], features: Tensor, lengths: Tensor, filled: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the prompts, their rotary factors, and which are seen; `lengths`, `filled`: [batch, 1]."""
    import torch

    batch, tokens = features.shape[:2]
    features = torch.nn.functional.pad(features, (0, 0, 0, (tokens + _STEP - 1) // _STEP * _STEP - tokens))
    place = torch.arange(features.shape[1])[None, :].expand(batch, -1)
    own, seen = (place < lengths)[..., None], place < filled
    text = torch.where(own, model.cap_embedder(features), model.cap_pad_token)
    zero = torch.zeros_like(place)
    return text, _rotary(tables, (place + 1, zero, zero)), seen


def _z_image_tokens(
    model: Any,
    tables: Sequence[Tensor],
    patches: Tensor,
    sizes: tuple[int, int, int],
    filled: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Tokens of the images and their rotary factors; positions go on after the prompt's, those that fill up are 0."""
    import torch

    batch, count = patches.shape[:2]
    more = (count + _STEP - 1) // _STEP * _STEP - count
    image = model.all_x_embedder[kind](patches)
    image = torch.cat([image, model.x_pad_token.to(image.dtype).expand(batch, more, -1)], dim=1)
    row, column = _grid(sizes[1], sizes[2])
    frame = torch.arange(sizes[0])[:, None].expand(sizes[0], sizes[1] * sizes[2]).reshape(-1)
    places = (
        filled + 1 + frame[None, :],
        row.repeat(sizes[0]).expand(batch, count),
        column.repeat(sizes[0]).expand(batch, count),
    )
    return image, _rotary(tables, [torch.nn.functional.pad(place, (0, more)) for place in places])


def _result(sample: Tensor, return_dict: bool) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


@contextmanager
def batched_forward(model: Any) -> Iterator[bool]:
    """While this is open, `model` computes its batch at once, as its graph does, if its class is one of these.

    Yields whether it is. Outputs are the same; the values of its modules have another order of tokens, and other
    values where a prompt has no token.
    """
    make = FORWARDS.get(type(model).__name__)
    if make is None:
        yield False
        return
    model.forward = make(model)
    try:
        yield True
    finally:
        del model.forward


FORWARDS: Mapping[str, Callable[[Any], Forward]] = {
    "Lumina2Transformer2DModel": _lumina2,
    "ZImageTransformer2DModel": _z_image,
}
"""Name of a backbone's class -> what makes its forward()."""
LISTS: Mapping[str, Lists] = {"ZImageTransformer2DModel": {"x": False, "cap_feats": True}}
"""Of these classes: the arguments that are a list of one tensor per image, which forward() here takes as one tensor."""
