"""Formats that change weights: channels scaled against their inputs (SmoothQuant, AWQ), low-rank branches (SVDQuant).

ModelOpt finds a factor per input channel, or two thin matrices. Before they change the weights they are rounded to
values that float16 and bfloat16 both hold exactly. So one checkpoint serves every compute type, and the weight
compensates the rounding, which would otherwise be an error of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffc.quantize.state import fake_mode_of, portable_values, tensor_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from diffc.quantize.state import Amax, Scaling


@contextmanager
def portable_scaling() -> Iterator[None]:
    """While this is open, ModelOpt's calibration uses portable channel factors and low-rank matrices."""
    from modelopt.torch.quantization import model_calib

    smooth, svd = model_calib.apply_pre_quant_scale_and_smooth, model_calib.svd

    def smooth_portably(linear: Any, pre_quant_scale: torch.Tensor) -> None:
        smooth(linear, portable_values(pre_quant_scale))

    def svd_portably(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
        parts = svd(weight, rank) if weight.numel() <= EXACT_SVD or weight.is_cuda else low_rank(weight, rank)
        return tuple(portable_values(part).to(weight.dtype) for part in parts)

    model_calib.apply_pre_quant_scale_and_smooth = smooth_portably
    model_calib.svd = svd_portably
    try:
        yield
    finally:
        model_calib.apply_pre_quant_scale_and_smooth = smooth
        model_calib.svd = svd


EXACT_SVD = 1 << 20
"""Elements of a weight up to which it is decomposed exactly on a CPU, which takes a second at this size."""


def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading part of a singular value decomposition, u * s [out, rank] and v [rank, in], in float32.

    By random projections with four power iterations (Halko et al. 2011, algorithm 4.4), seeded: the whole
    decomposition of one FLUX weight takes minutes.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight.float(), q=min(rank + 16, *weight.shape), niter=4)
    return u[:, :rank] * s[:rank], v[:, :rank].T


def apply_scaling(backbone: nn.Module, scaling: Scaling, *, weights: bool = True) -> None:
    """Give the quantized layers of `backbone` their factors and branches, and change their `weights` accordingly.

    In the order and with the roundings of ModelOpt: weight / factor in float32, rounded to the weight's type;
    then minus the branch, whose product is computed in float64 so that every implementation rounds it alike. Fake
    weights stay as they are: they have shapes only.
    """
    _make_branches(backbone, scaling)
    for name, array in scaling.items():
        path, _, kind = name.rpartition(".")
        quantizer: Any = backbone.get_submodule(path)
        weight: Any = backbone.get_submodule(path.rpartition(".")[0]).weight
        setattr(quantizer, kind, tensor_of(array, weight, weight.dtype))
    for path, own in by_layer(scaling).items() if weights else ():
        layer: Any = backbone.get_submodule(path)
        if fake_mode_of(layer.weight) is None and not layer.weight.is_meta:
            layer.weight.data = scaled(layer.weight.data, own)


def by_layer(scaling: Scaling) -> dict[str, dict[str, Amax]]:
    """The arrays of each layer, by what they are ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")."""
    found: dict[str, dict[str, Amax]] = {}
    for name, array in scaling.items():
        path, _, kind = name.rpartition(".")
        found.setdefault(path.rpartition(".")[0], {})[kind] = array
    return found


def scaled(weight: torch.Tensor, own: Mapping[str, Amax]) -> torch.Tensor:
    """A layer's weight [out, in], changed by that layer's arrays as `apply_scaling` says; in its type and device."""
    import torch

    if "pre_quant_scale" in own:
        weight = (weight.float() * (1.0 / tensor_of(own["pre_quant_scale"], weight))).to(weight.dtype)
    if "svdquant_lora_b" in own:
        outer, inner = (torch.from_numpy(own[f"svdquant_lora_{side}"]).double() for side in "ba")
        weight = (weight.double() - (outer @ inner).to(weight.device)).float().to(weight.dtype)
    return weight


def _make_branches(backbone: nn.Module, scaling: Scaling) -> None:
    """Let the layers with a low-rank branch be ModelOpt's SVDQuantLinear."""
    from modelopt.torch.quantization.conversion import SVDQuantModuleRegistry
    from modelopt.torch.quantization.nn import SVDQuantLinear

    for name in scaling:
        path, _, kind = name.rpartition(".")
        if kind != "svdquant_lora_a":
            continue
        layer = backbone.get_submodule(path.rpartition(".")[0])
        if type(layer) not in SVDQuantModuleRegistry:
            SVDQuantModuleRegistry.register({type(layer): type(layer).__name__})(SVDQuantLinear)
        SVDQuantModuleRegistry.convert(layer)
