"""Puts ModelOpt's quantizers into a backbone: where a format wants them, and nowhere else.

Only layers that own a weight matrix or kernel are converted. ModelOpt's own `replace_quant_module` also
converts norms, whose inputs its presets then quantize by accident, and attention, where it replaces
scaled_dot_product_attention by an autograd function that computes amax on every call and that torch.export
cannot keep as one node.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError
from diffc.quantize.formats import Format

if TYPE_CHECKING:
    from torch import nn


def insert_quantizers(backbone: nn.Module, fmt: Format, unquantized: str) -> None:
    """Convert the layers of `backbone` in place and enable the quantizers of `fmt`, not yet calibrated.

    `unquantized` is a regular expression; modules whose path it matches from the start stay as they are.
    Works on real weights and under FakeTensorMode alike. A format without a preset changes nothing.
    Raises DiffcError when the backbone holds quantizers already, or when no layer is left for the format.
    """
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg

    if fmt.preset is None:
        return
    kept = re.compile(unquantized)
    convert_layers(backbone, [name for name in weighted_layers(backbone) if not kept.match(name)])
    set_quantizer_by_cfg(backbone, fmt.config()["quant_cfg"])
    if not enabled_quantizers(backbone):
        raise DiffcError(
            f"format {fmt.name!r} quantizes no layer of this {type(backbone).__name__}: all of its linear and"
            f" convolution layers match {unquantized!r}, which names what stays unquantized",
            mend="use --format none",
        )


def weighted_layers(backbone: nn.Module) -> list[str]:
    """Paths of the modules with a weight that ModelOpt can quantize: linear layers and convolutions.

    Raises DiffcError when the backbone holds quantizers already.
    """
    from modelopt.torch.quantization.nn import QuantLinearConvBase, QuantModuleRegistry

    if _quantizers(backbone):
        raise DiffcError(
            f"this {type(backbone).__name__} holds quantizers already",
            mend="load the unquantized model again",
        )
    layers = ((name, QuantModuleRegistry.get(type(module))) for name, module in backbone.named_modules())
    return [name for name, cls in layers if cls is not None and issubclass(cls, QuantLinearConvBase)]


def convert_layers(backbone: nn.Module, paths: list[str]) -> None:
    """Give the layers at `paths` (of `weighted_layers`) their quantizers, in place and switched off."""
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    for path in paths:
        QuantModuleRegistry.convert(backbone.get_submodule(path))
    for quantizer in _quantizers(backbone).values():
        quantizer.disable()


def enabled_quantizers(backbone: nn.Module) -> dict[str, Any]:
    """The TensorQuantizers of `backbone` that are on, by module path, in module order."""
    return {name: quantizer for name, quantizer in _quantizers(backbone).items() if quantizer.is_enabled}


def _quantizers(backbone: nn.Module) -> dict[str, Any]:
    from modelopt.torch.quantization.nn import TensorQuantizer

    return {name: module for name, module in backbone.named_modules() if isinstance(module, TensorQuantizer)}
