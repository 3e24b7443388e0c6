"""NVFP4 and MXFP8 fake quantization on any device: ModelOpt itself has only CUDA kernels for them.

Both are computed in float32 as those kernels do: the Triton one for NVFP4 (`fp4_kernel_hopper.py`), the CUDA
extension for MXFP8 (`tensor_quant_mx.cu`). tests/data/README.md says how far the two were compared on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from passes.graph.trt_ops import FOUR_OVER_SIX

if TYPE_CHECKING:
    import torch

E2M1_MAX = 6.0
"""The largest magnitude of a 4-bit float."""
E4M3_MAX = 448.0
"""The largest magnitude of an 8-bit float with 4 bits of exponent."""
FOUR_SIX_MAX = 256.0
"""The largest block scale of "four over six" that belongs to 6: 1.5 times as much belongs to 4, and is no 448 yet."""
E8M0_BIAS = 127
SMALLEST_BLOCK_SCALE = 1e-5
"""Below it, ModelOpt's kernel takes 1 for the scale of an NVFP4 block."""
NVFP4_KERNEL_BLOCK = 16
"""The only block size of ModelOpt's NVFP4 kernel."""
_PIECE = 1 << 20
"""Elements that are rounded at a time: larger temporaries cost more than the rounding."""


def nvfp4_fake_quant(x: torch.Tensor, amax: torch.Tensor, block_size: int = 16) -> torch.Tensor:
    """`x` [..., K] in float32, float16 or bfloat16 -> what remains of it in NVFP4, of the same shape and type.

    `nvfp4_round_trip` with s2 = amax / (6 * 448), where `amax` is that of the tensor, or several of which the largest
    counts. The division is computed as torch divides by a number on CUDA: amax * float32(1 / 2688).
    """
    import torch

    scale = amax.to(x.device, torch.float32).amax() * (1.0 / (E2M1_MAX * E4M3_MAX))
    return nvfp4_round_trip(x, scale, block_size)


def nvfp4_round_trip(x: torch.Tensor, scale: torch.Tensor, block_size: int = 16) -> torch.Tensor:
    """The same for a given float32 scale s2 of the tensor, shape []; 1e-12 instead if it is not above 0.

    For each block of `block_size` elements along the last axis (a partial last one is filled up with zeros):
    s = E4M3(min(block amax / (6 * s2), 448)), b = s * s2, or 1 where that is below 1e-5; y = E2M1(|x| / b) * b
    with ties to even and the sign of x. As in the kernel, no zero has a sign, NaN becomes -6 * b, and is
    overlooked in the amax of its block.

    The kernel divides approximately (`div.full.f32`, 2 ulp): where |x| / b is that close to a tie it may take
    the other neighbour. Here the division is exact, as in the graphs.
    """
    import torch

    scale = torch.where(scale > 0, scale, 1e-12)
    return _piece_by_piece(lambda rows: _nvfp4_rows(rows, scale, block_size), x)


def four_six_fake_quant(x: torch.Tensor, amax: torch.Tensor, block_size: int = 16) -> torch.Tensor:
    """`four_six_round_trip` with s2 = amax / (6 * 256), which leaves the scales of blocks room for 1.5 times theirs."""
    import torch

    scale = amax.to(x.device, torch.float32).amax() * (1.0 / (E2M1_MAX * FOUR_SIX_MAX))
    return four_six_round_trip(x, scale, block_size)


def four_six_round_trip(x: torch.Tensor, scale: torch.Tensor, block_size: int = 16) -> torch.Tensor:
    """NVFP4 "four over six": as `nvfp4_round_trip`, and each block with its largest magnitude at 6 or at 4.

    E2M1 has no value between 4 and 6, so a block with a second value near its largest may lose less with a scale of
    1.5 times the size. Whichever has the smaller squared error is taken, 6 where both are alike. The errors are summed
    in float64, one element after another, as `passes.weights.block_operations` does.
    """
    import torch

    scale = torch.where(scale > 0, scale, 1e-12)
    return _piece_by_piece(lambda rows: _four_six_rows(rows, scale, block_size), x)


def _four_six_rows(x: torch.Tensor, scale: torch.Tensor, block_size: int) -> torch.Tensor:
    import torch

    six, four = (_nvfp4_rows(x.float(), scale, block_size, top) for top in (E2M1_MAX, 4.0))
    errors = []
    for rounded in (six, four):
        squares = (_blocks(rounded, block_size).double() - _blocks(x, block_size).double()).square()
        total = torch.zeros_like(squares[..., 0])
        for i in range(block_size):
            total += squares[..., i]
        errors.append(total)
    better = (errors[1] < errors[0]).repeat_interleave(block_size, -1)[:, : x.shape[-1]]
    return torch.where(better, four, six).to(x.dtype)


def _nvfp4_rows(x: torch.Tensor, scale: torch.Tensor, block_size: int, top: float = E2M1_MAX) -> torch.Tensor:
    import torch

    blocks = _blocks(x, block_size)
    size = blocks.abs()
    largest = size.nan_to_num(nan=-1.0, posinf=torch.inf).amax(-1, keepdim=True)
    largest = torch.where(largest < 0, torch.inf, largest)  # nothing but NaN
    steps = (largest / (top * scale)).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
    steps = torch.where(steps >= SMALLEST_BLOCK_SCALE, steps, 1.0)
    rounded = _round_to_e2m1(size.div_(steps)).mul_(steps)
    return _unblock(torch.where(blocks >= 0, rounded, 0.0 - rounded), x)


def mxfp8_fake_quant(x: torch.Tensor, block_size: int = 32) -> torch.Tensor:
    """`x` [..., K] in float32, float16 or bfloat16 -> what remains of it in MXFP8, of the same shape and type.

    For each block of `block_size` elements along the last axis (a partial last one is filled up with zeros):
    e = ceil(log2(block amax / 448)), 0 for a block of zeros; y = E4M3(|x| * 2^-e) * 2^e, saturating, with the
    sign of x. As in the kernel, infinity counts as the largest float32 and NaN is overlooked in the amax of its
    block; a large float16 value may round up to infinity. Other than the kernel, zero keeps its sign (the
    kernel reads an uninitialised one), and subnormal numbers are not flushed to zero.
    """
    return _piece_by_piece(lambda rows: _mxfp8_rows(rows, block_size), x)


def _mxfp8_rows(x: torch.Tensor, block_size: int) -> torch.Tensor:
    import torch

    blocks = _blocks(x, block_size)
    size = blocks.abs()
    largest = size.nan_to_num(nan=0.0).amax(-1, keepdim=True)
    exponent = _ceil_log2(largest / E4M3_MAX).masked_fill_(largest == 0, 0)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    rounded = size.div_(scale).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float().mul_(scale)
    return _unblock(torch.where(blocks < 0, -rounded, rounded), x)


def _piece_by_piece(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function` of a matrix, applied to few rows of `x` [..., K] at a time: what it makes then stays in the cache."""
    import torch

    rows = x.detach().reshape(-1, x.shape[-1])
    if x.device.type != "cpu" or len(rows) * rows.shape[1] <= _PIECE:
        return function(rows).reshape(x.shape)
    out = torch.empty_like(rows)
    step = max(1, _PIECE // rows.shape[1])
    for start in range(0, len(rows), step):
        out[start : start + step] = function(rows[start : start + step])
    return out.reshape(x.shape)


def _blocks(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """[..., K] -> float32 [rows, blocks, block_size], padded with zeros at the end of a row."""
    from torch.nn.functional import pad

    rows = x.detach().reshape(-1, x.shape[-1]).float()
    if rest := -x.shape[-1] % block_size:
        rows = pad(rows, (0, rest))
    return rows.reshape(rows.shape[0], -1, block_size)


def _unblock(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `_blocks`, in the shape and type of `like`."""
    return blocks.flatten(1)[:, : like.shape[-1]].to(like.dtype).reshape(like.shape)


def _round_to_e2m1(size: torch.Tensor) -> torch.Tensor:
    """Magnitudes -> the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6, ties to even; 6 for anything larger and for NaN."""
    import torch

    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.where(size < E2M1_MAX, (size / step).round_().mul_(step), E2M1_MAX)


def _ceil_log2(ratio: torch.Tensor) -> torch.Tensor:
    """ceil(log2(ratio)) in -127..127, int32, from the bits of a positive float32."""
    import torch

    bits = ratio.view(torch.int32)
    field, significand = bits >> 23, bits & 0x7FFFFF
    up = (significand > 0) & (field != 0xFE) & ~((field == 0) & (significand <= 0x400000))
    return field - E8M0_BIAS + up.int()


@contextmanager
def cpu_block_quant() -> Iterator[None]:
    """ModelOpt's dynamic block quantizers run on CPU tensors while this is open; CUDA ones keep its kernels.

    With one exception: its NVFP4 kernel takes blocks of 16 whatever the quantizer says, so other sizes are
    simulated here on any device; "four over six" as well, which ModelOpt has for calibrated blocks alone. Raises
    NotImplementedError, as ModelOpt does, for a block format that is neither NVFP4 nor MXFP8.
    """
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.nn import TensorQuantizer

    on_cuda, original = tensor_quant.dynamic_block_quantize_op, TensorQuantizer._fake_quantize
    four_six = False

    def fake_quantize(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        nonlocal four_six
        four_six = bool((self.block_sizes or {}).get(FOUR_OVER_SIX))
        try:
            result: torch.Tensor = original(self, inputs)
            return result
        finally:
            four_six = False

    def quantize(
        inputs: torch.Tensor,
        block_size: int,
        amax: torch.Tensor | None,
        num_bits: int,
        exponent_bits: int,
        scale_num_bits: int,
        scale_exponent_bits: int,
    ) -> torch.Tensor:
        bits = (num_bits, exponent_bits, scale_num_bits, scale_exponent_bits)
        nvfp4 = bits == (4, 2, 8, 4)
        if nvfp4 and amax is not None and four_six:
            return four_six_fake_quant(inputs, amax, block_size)
        if inputs.device.type != "cpu" and (not nvfp4 or block_size == NVFP4_KERNEL_BLOCK):
            result: torch.Tensor = on_cuda(inputs, block_size, amax, *bits)
            return result
        if nvfp4 and amax is not None:
            return nvfp4_fake_quant(inputs, amax, block_size)
        if bits == (8, 4, 9, 8):
            return mxfp8_fake_quant(inputs, block_size)
        raise NotImplementedError(f"no simulation of E{exponent_bits} blocks of {num_bits} bits on the CPU")

    with (
        patch.object(tensor_quant, "dynamic_block_quantize_op", quantize),
        patch.object(TensorQuantizer, "_fake_quantize", fake_quantize),
    ):
        yield
