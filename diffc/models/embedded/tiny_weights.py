"""Seeded weights for the embedded models: the same bytes on every machine, no layer without an effect.

Diffusers' own initialisation leaves many layers at or near zero (adaLN, output projections), so that a
graph that drops them would still agree. Here every tensor varies and every layer carries signal.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SPREAD = 0.1  # of biases around 0 and norm scales around 1
SMOOTH_FREQUENCY = 1e-3  # radians per step of the 1000 training steps
QUERY_OR_KEY = re.compile(r"\.(to_[qk]|add_[qk]_proj|norm_[qk]|norm_added_[qk])\.weight$")


def seed_weights(module: torch.nn.Module, seed: str) -> None:
    """Fill every parameter of `module` in place, float32; buffers stay as they are.

    Matrices and convolutions are normal with std 1/sqrt(fan_in) (unit variance in, unit variance out),
    embeddings normal with std 1, biases normal around 0, norm scales around 1. Each tensor has its own numpy
    generator, seeded by `seed` and its name: torch's global state and thread count play no part, and neither
    does the CPU (torch's own normal_ takes another path, with other bytes, where AVX2 is missing).
    """
    import torch

    with torch.no_grad():
        for prefix, part in module.named_modules():
            for leaf, parameter in part.named_parameters(recurse=False):
                mean, std = _distribution(part, leaf, parameter)
                digest = hashlib.sha256(f"{seed}/{prefix}.{leaf}".encode()).digest()
                generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
                values = mean + std * generator.standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def smooth_in_time(weight: torch.nn.Parameter) -> None:
    """Damp in place what reads a time embedding's fast sinusoids, [out, 2 * frequencies]; norm unchanged.

    As in trained models, a time that is rounded (FLUX multiplies a bfloat16 guidance of 3.5 by 1000 and gets
    3504) then changes the output by no more than other roundings do. The frequencies are 10000^(-i/n),
    cosines first (diffusers.models.embeddings.get_timestep_embedding).
    """
    import torch

    count = weight.shape[1] // 2
    gain = np.minimum(1.0, SMOOTH_FREQUENCY / 10000.0 ** -(np.arange(count) / count))
    gain /= np.sqrt(np.mean(gain**2))
    with torch.no_grad():
        weight.mul_(torch.from_numpy(np.tile(gain, 2).astype(np.float32)))


def sharpen_attention(model: torch.nn.Module, gain: float) -> None:
    """Multiply what makes queries and keys by `gain` in place: logits grow by gain^2, to a std of about that.

    Over many keys, attention with logits of unit variance is so close to a plain mean that a wrong query of
    one stream moves the output by less than the tolerance of 16-bit types.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if QUERY_OR_KEY.search(name):
                parameter.mul_(gain)


def calm(model: torch.nn.Module, gains: Mapping[str, float]) -> None:
    """Multiply weights and biases by the gain of the first pattern that matches their module's path, in place.

    In trained models a block adds little to its stream. With branches as large as the stream, one value that
    rounds to the neighbouring step of a quantizer in the first block decides, block after block, on all later
    roundings: two correct float32 implementations of a quantized model then differ by several percent.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            path = name.rpartition(".")[0]
            parameter.mul_(next((gain for what, gain in gains.items() if re.fullmatch(what, path)), 1.0))


def _distribution(part: torch.nn.Module, leaf: str, parameter: torch.nn.Parameter) -> tuple[float, float]:
    """Mean and standard deviation of one parameter."""
    from torch import nn

    if isinstance(part, nn.Embedding):
        return 0.0, 1.0
    if parameter.ndim > 1:
        return 0.0, 1 / math.sqrt(math.prod(parameter.shape[1:]))
    return (1.0 if leaf == "weight" else 0.0), SPREAD
