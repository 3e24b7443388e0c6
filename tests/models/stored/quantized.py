"""Small quantized files, made by the published layouts from the weights of embedded models."""

from __future__ import annotations

import json
from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch

from passes.weights.stored_operations import swizzled

State = dict[str, torch.Tensor]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def fp8(name: str, weight: torch.Tensor) -> State:
    """ComfyUI's float8: one scale for the weight, one for the input."""
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {
        f"{name}.weight": codes,
        f"{name}.weight_scale": scale,
        f"{name}.input_scale": torch.tensor(0.02),
    } | told(name, "float8_e4m3fn")


def fp8_weights(name: str, weight: torch.Tensor) -> State:
    """The same without a scale for the input."""
    made = fp8(name, weight)
    del made[f"{name}.input_scale"]
    return made


def int8(name: str, weight: torch.Tensor) -> State:
    """ComfyUI's int8: a scale for each row."""
    scale = weight.float().abs().amax(1) / 127
    codes = (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {
        f"{name}.weight": codes,
        f"{name}.weight_scale": scale,
        f"{name}.input_scale": torch.tensor(0.05),
    } | told(name, "int8_tensorwise")


def nvfp4(name: str, weight: torch.Tensor) -> State:
    """ComfyUI's NVFP4: the upper half of a byte first, scales of blocks in tiles."""
    values = weight.float().numpy().reshape(len(weight), -1, 16)
    tensor = np.float32(np.abs(values).max() / (6 * 448))
    scales = (np.abs(values).max(-1) / 6 / tensor).astype(ml_dtypes.float8_e4m3fn)
    steps = values / np.maximum(scales.astype(np.float32) * tensor, 1e-12)[..., None]
    codes = np.abs(np.abs(steps)[..., None] - E2M1).argmin(-1) | (steps < 0) << 3
    codes = codes.reshape(len(weight), -1).astype(np.uint8)
    packed = codes[:, 0::2] << 4 | codes[:, 1::2]
    return {
        f"{name}.weight": torch.from_numpy(packed),
        f"{name}.weight_scale": torch.from_numpy(swizzled(scales).view(np.uint8)).view(torch.float8_e4m3fn),
        f"{name}.weight_scale_2": torch.tensor(float(tensor)),
        f"{name}.input_scale": torch.tensor(0.002),
    } | told(name, "nvfp4")


def mxfp8(name: str, weight: torch.Tensor) -> State:
    """ComfyUI's MXFP8: powers of two for blocks of 32, in tiles."""
    values = weight.float().numpy().reshape(len(weight), -1, 32)
    powers = np.ceil(np.log2(np.maximum(np.abs(values).max(-1), 1e-30) / 448)).clip(-127, 127)
    codes = (
        torch.from_numpy(values / 2.0 ** powers[..., None]).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    )
    return {
        f"{name}.weight": codes.reshape(weight.shape),
        f"{name}.weight_scale": torch.from_numpy(swizzled((powers + 127).astype(np.uint8))),
    } | told(name, "mxfp8")


def told(name: str, format: str) -> State:
    """ComfyUI's note of a layer's format."""
    return {
        f"{name}.comfy_quant": torch.frombuffer(
            bytearray(json.dumps({"format": format}).encode()), dtype=torch.uint8
        )
    }


MAKERS: dict[str, Callable[[str, torch.Tensor], State]] = {
    "fp8": fp8,
    "fp8 weights": fp8_weights,
    "int8": int8,
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
}


def quantized(state: State, kind_of: Callable[[str], str]) -> State:
    """`state` with the layers whose kind `kind_of` gives, by name, quantized; others as they are."""
    made = State()
    for key, tensor in state.items():
        name = key.removesuffix(".weight")
        kind = kind_of(name) if key.endswith(".weight") and tensor.dim() == 2 else ""
        made |= MAKERS[kind](name, tensor) if kind else {key: tensor}
    return made
