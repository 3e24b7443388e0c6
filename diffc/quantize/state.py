"""The state of one quantizer as plain values: from ModelOpt to a checkpoint, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from diffc.errors import DiffcError
from diffc.quantize.kinds import Kind, Settings

if TYPE_CHECKING:
    import torch

Amax = npt.NDArray[np.float32]
"""The largest magnitude that a quantizer represents: shape [], or broadcasting against the weight."""

SMALLEST_SCALE = 2.0**-17
"""See `portable`."""

Scaling = Mapping[str, npt.NDArray[np.float32]]
"""The arrays of quantizers beside amax, by the quantizer's path and one of `SCALING`."""

SCALING = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
"""pre_quant_scale is the factor of each input channel, [in]. The others are a weight's low-rank branch, [rank, in] and
[out, rank]."""


def settings_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that decide the arithmetic of a quantizer, from its ModelOpt state, as plain JSON values."""
    chosen = {
        "num_bits": state["_num_bits"],
        # After a quantizer of blocks has run, ModelOpt notes here how it reshaped the first input.
        "axis": None if state["_block_sizes"] else state["_axis"],
        "block_sizes": state["_block_sizes"],
        "type": "dynamic" if state["_dynamic"] else "static",
        "unsigned": state["_unsigned"],
        "narrow_range": state["_narrow_range"],
    }
    plain: dict[str, Any] = json.loads(json.dumps(chosen))
    return plain


def attributes_of(settings: Settings) -> dict[str, Any]:
    """The inverse of `settings_of` for ModelOpt: lists become tuples, axes of blocks become numbers."""

    def value(item: Any) -> Any:
        return tuple(item) if isinstance(item, list) else item

    attributes = {key: value(item) for key, item in settings.items()}
    if blocks := settings["block_sizes"]:
        attributes["block_sizes"] = {
            int(key) if key.lstrip("-").isdigit() else key: value(item) for key, item in blocks.items()
        }
    return attributes


def tensor_of(array: Amax, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`array` in `dtype` (float32) on the device of `like`; when that is fake, a fake tensor of its shape.

    Where `like` is on the meta device it waits for its values (accelerate), and `array` goes to the CPU.
    """
    import torch

    dtype = dtype or torch.float32
    if (mode := fake_mode_of(like)) is not None:
        with mode:
            return torch.empty(array.shape, dtype=dtype, device=like.device)
    return torch.from_numpy(array.copy()).to("cpu" if like.is_meta else like.device, dtype)


def fake_mode_of(tensor: torch.Tensor) -> Any | None:
    """The FakeTensorMode that `tensor` belongs to; None when it holds values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None


def usable_amax(name: str, amax: torch.Tensor | None, kind: Kind) -> torch.Tensor:
    """`amax` of the quantizer `name` in float32, every element finite and above zero, with a portable scale.

    A channel or block of zeros gets amax 1: it quantizes to zeros with any scale, and a scale of 0 would make
    NaN. See `portable` for what the scale becomes; that of NVFP4 stays as it is, since graphs hold it in float32.
    Raises DiffcError when there is no amax, when one is not finite or below zero, and when all are zero.
    """
    import torch

    if amax is None:
        raise _uncalibrated(name, "was never run")
    if not torch.isfinite(amax).all():
        raise _uncalibrated(name, "has an amax that is not finite")
    if (amax < 0).any():
        raise _uncalibrated(name, "has an amax below zero")
    if not amax.any():
        raise _uncalibrated(name, "saw nothing but zeros")
    positive = torch.where(amax > 0, amax.float(), 1.0)
    return portable(positive, kind.bound) if kind.portable else positive


def portable_values(tensor: torch.Tensor) -> torch.Tensor:
    """The nearest values that float16 and bfloat16 both hold exactly, in float32."""
    import torch

    wide = tensor.to(torch.bfloat16).to(torch.float16)
    return wide.to(torch.bfloat16).float()


def portable(amax: torch.Tensor, bound: float) -> torch.Tensor:
    """The nearest amax, not below `amax`, for which amax / bound is exact in float32, float16 and bfloat16 alike.

    Graphs hold scales in the compute type. A rounded scale would move the quantization grid against the one
    that ModelOpt simulates with; an exact one makes both the same, for at most 1/128 of range. The scale gets
    bfloat16's 8 significant bits, and is at least 2^-17, below which float16 would drop some of them.
    """
    import torch

    scale = (amax / bound).clamp(min=SMALLEST_SCALE)
    exact = (scale.view(torch.int32) & ~0xFFFF).view(torch.float32)
    above = ((scale.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    # The amax of a portable scale may come back one rounding above it: that must not move it to the next step.
    return torch.where(scale <= exact * (1 + 1e-6), exact, above) * bound


def _uncalibrated(name: str, what: str) -> DiffcError:
    layer = name.rpartition(".")[0]
    return DiffcError(
        f"{name} {what} during calibration, so it has no scale",
        fix=f"calibrate with more prompts or steps; or leave {layer} unquantized in the family's"
        " Family.unquantized",
    )
