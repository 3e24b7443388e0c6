"""Holds "four over six" weights against ModelOpt's own, and CUDA against the CPU.

    python -m tools.prove.four_six [--device cuda]

ModelOpt finds the scale of each block by the squared error as well, over static blocks. Where two scales are alike in
error, either may be taken, and in bfloat16 ModelOpt rounds 1.5 times an amax: so squared errors of whole weights are
compared. Prints a JSON line for each weight, and exits with 1 when one loses 0.1 % more than ModelOpt's. Its fake
quantization of static blocks needs CUDA and Triton; on the CPU that kernel is written out.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from diffc.quantize.simulate import four_six_fake_quant

SHAPES = ((64, 64), (512, 768), (3072, 3072))


def main() -> int:
    """Compare every shape and type; 1 when one differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    shapes = SHAPES if device.type == "cuda" else SHAPES[:2]
    rows = [compare(shape, dtype, device) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    for row in rows:
        print(json.dumps(row))
    return int(any(row["cuda_differs"] or row["error"] > row["modelopts_error"] * (1 + 1e-3) for row in rows))


def compare(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """One weight: how many of its blocks differ from ModelOpt's, what both lose, and how many values CUDA changes."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
    weight = weight.to(dtype).to(device)
    ours = four_six_fake_quant(weight, weight.abs().max())
    on_cpu = four_six_fake_quant(weight.cpu(), weight.abs().max().cpu())
    theirs = modelopts(weight)
    errors = [(w.double() - weight.double()).square().reshape(-1, 16).sum(1) for w in (ours, theirs)]
    differing = (ours != theirs).reshape(-1, 16).any(1)
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "blocks": differing.numel(),
        "differing_blocks": int(differing.sum()),
        "error": float(errors[0].sum() / weight.double().square().sum()),
        "modelopts_error": float(errors[1].sum() / weight.double().square().sum()),
        "cuda_differs": int((ours.cpu() != on_cpu).sum()),
    }


def modelopts(weight: Tensor) -> Tensor:
    """What remains of a weight in ModelOpt's preset NVFP4_FOUR_OVER_SIX_CFG."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import tensor_quant

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
    layer.weight.data = weight.clone()
    model = nn.Sequential(layer)
    config = copy.deepcopy(mtq.NVFP4_FOUR_OVER_SIX_CFG)
    config["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    kernel = (
        patch.object(tensor_quant, "triton_kernel", _Written())
        if weight.device.type == "cpu"
        else nullcontext()
    )
    with torch.no_grad(), redirect_stdout(StringIO()), kernel:
        mtq.quantize(model, config, forward_loop=lambda m: m(torch.ones_like(weight[:1])))
        found: Tensor = model[0].weight_quantizer(weight)
    return found


class _Written:
    """What ModelOpt's Triton kernel for static NVFP4 blocks computes, in torch."""

    IS_AVAILABLE = True

    @staticmethod
    def static_blockwise_fp4_fake_quant(
        x: Tensor, amax: Tensor, global_amax: Tensor, rounds: bool, most: float, dtype: torch.dtype
    ) -> Tensor:
        """`x` [blocks, 16], whose scales are amax / 6 in E4M3 steps of global_amax / (6 * most)."""
        del rounds  # it always does
        tensor = global_amax.float() / (6.0 * most)
        scales = (amax.float().reshape(-1, 1) / 6.0 / tensor).clamp(2.0**-9, 448.0)
        steps = scales.to(torch.float8_e4m3fn).float() * tensor
        size = (x.float() / steps).abs()
        step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        values = ((size / step).round() * step).clamp(max=6.0) * steps * x.float().sign()
        return values.to(dtype)


if __name__ == "__main__":
    sys.exit(main())
