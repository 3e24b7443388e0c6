"""The reference for weights that are quantized twice (w4a8: INT4 blocks, then FP8): ties as ONNX breaks them.

The graph holds the INT4 values, dequantizes them in the compute type and quantizes that to FP8. INT4 values times a
scale of 8 bits often lie exactly between two FP8 steps, and ModelOpt multiplies with a reciprocal where ONNX divides.
Which side a tie falls to is no fault of either, so the reference takes ONNX's.
"""

from __future__ import annotations

from typing import Any

import torch

from diffc.quantize.state import BOUNDS


def quantize_twice_as_graphs_do(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let every weight with INT4 and FP8 quantizers in sequence have ONNX's values; `dtype` is the compute type."""
    from modelopt.torch.quantization.nn import SequentialQuantizer

    def dequantized(quantizer: Any, _: Any, out: torch.Tensor) -> torch.Tensor:
        scale: torch.Tensor = quantizer.amax.float() / BOUNDS["int4"]
        blocks = out.float().reshape(scale.shape[0], -1)
        values = (
            blocks / scale
        ).round() * scale  # ModelOpt's INT4 values, its last bit of dequantization aside
        return values.reshape(out.shape).to(dtype).to(out.dtype)

    def to_fp8(quantizer: Any, inputs: Any, _: Any) -> torch.Tensor:
        x: torch.Tensor = inputs[0]
        scale: torch.Tensor = quantizer.amax.float() / BOUNDS["fp8"]
        bound = BOUNDS["fp8"]
        steps = (x.float() / scale).clamp(-bound, bound).to(torch.float8_e4m3fn).float()
        return (steps * scale).to(x.dtype)

    for module in model.modules():
        if isinstance(module, SequentialQuantizer):
            module[0].register_forward_hook(dequantized)
            module[1].register_forward_hook(to_fp8)
