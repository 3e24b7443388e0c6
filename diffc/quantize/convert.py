"""Puts ModelOpt's quantizers into a backbone: where a format wants them, and nowhere else.

Only layers that own a weight matrix or kernel are converted, and attention where it is asked for. ModelOpt's
own `replace_quant_module` also converts norms, whose inputs its presets then quantize by accident, and every
attention, where it replaces scaled_dot_product_attention by an autograd function that computes amax on every
call and that torch.export cannot keep as one node (`diffc.frontend.quantizers` has its way around that).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError
from diffc.quantize.attention import attention_layers
from diffc.quantize.formats import Format
from diffc.quantize.options import QuantOptions
from passes.base import collector_paused

if TYPE_CHECKING:
    from torch import nn

_QUANTIZER = re.compile(r"^(.*?)\.?(\w+_quantizer)(?:\.(\d+))?$")


def layer_of(quantizer: str) -> str:
    """The module path of the layer that a quantizer belongs to: `a.weight_quantizer.0` -> `a`."""
    found = _QUANTIZER.match(quantizer)
    return found[1] if found else quantizer.rpartition(".")[0]


def role_of(quantizer: str) -> str:
    """What a quantizer is for: `a.weight_quantizer.0` -> `weight_quantizer`."""
    found = _QUANTIZER.match(quantizer)
    return found[2] if found else quantizer.rpartition(".")[2]


@collector_paused()  # the first call imports ModelOpt
def insert_quantizers(
    backbone: nn.Module, fmt: Format, unquantized: str, options: QuantOptions | None = None
) -> None:
    """Convert the layers of `backbone` in place and enable the quantizers of `fmt`, not yet calibrated.

    `unquantized` is a regular expression; modules whose path it matches from the start stay as they are, and so
    do those that `options` leave out, convolutions where the format has none, and layers whose weight is not
    whole blocks. Works on real weights and under FakeTensorMode alike. Raises DiffcError when the backbone holds
    quantizers already, or when no layer is left for the format.
    """
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg

    if not fmt.quantizes:
        return
    options = options or QuantOptions()
    chosen = chosen_layers(backbone, fmt, unquantized, options)
    attentions = attention_layers(backbone) if options.quantizes_attention else []
    convert_layers(backbone, [*chosen, *attentions])
    set_quantizer_by_cfg(backbone, options.rules(fmt))
    if not chosen:
        raise DiffcError(
            f"format {fmt.name!r} quantizes no layer of this {type(backbone).__name__}: all of its layers match"
            f" {unquantized!r}, which names what stays unquantized, or a pattern of yours, or cannot hold"
            f" {'blocks of ' + str(fmt.block_size) if fmt.block_size else 'the format'}",
            fix="use --format none",
        )


def chosen_layers(backbone: nn.Module, fmt: Format, unquantized: str, options: QuantOptions) -> list[str]:
    """Paths of the layers that a format quantizes, in module order."""
    kept = re.compile(unquantized)
    block = options.block_size or fmt.block_size
    return [
        name
        for name in weighted_layers(backbone)
        if not kept.match(name) and not options.keeps(name) and _fits(backbone, name, fmt, block, options)
    ]


def _fits(backbone: nn.Module, name: str, fmt: Format, block: int | None, options: QuantOptions) -> bool:
    weight = backbone.get_parameter(f"{name}.weight")
    convolution = weight.dim() > 2
    if not options.chosen(name, convolution) or (convolution and fmt.layers == "linear"):
        return False
    return block is None or weight.shape[-1] % block == 0


def hidden_matrices(backbone: nn.Module) -> dict[str, int]:
    """Matrices that a module multiplies by itself, in a functional call, and their sizes: no quantizer reaches them.

    These are parameters of two axes and more, both of 32 and more, that no layer for ModelOpt, embedding or norm owns:
    experts that are stored as one tensor, say.
    """
    from torch import nn

    owners = {*_convertible(backbone, _layer_base())}
    found = {}
    for path, module in backbone.named_modules():
        if path in owners or isinstance(module, nn.Embedding | nn.LayerNorm | nn.GroupNorm):
            continue
        for name, weight in module.named_parameters(recurse=False):
            place = f"{path}.{name}".lstrip(".")
            if weight.dim() > 1 and min(weight.shape[-2:]) >= _SMALL and not _TABLE.search(place):
                found[place] = weight.numel()
    return found


_SMALL = 32
"""Rows and columns of what is no matrix of a product: tables of modulation have few rows."""
_TABLE = re.compile(r"pos_embed|position|token|latent")
"""Names of parameters that are added to values or stand in for them: no product either."""


def _layer_base() -> type:
    from modelopt.torch.quantization.nn import QuantLinearConvBase

    return QuantLinearConvBase  # type: ignore[no-any-return]  # ModelOpt has no type information


def weighted_layers(backbone: nn.Module) -> list[str]:
    """Paths of the modules with a weight that ModelOpt can quantize: linear layers and convolutions.

    Raises DiffcError when the backbone holds quantizers already.
    """
    if _quantizers(backbone):
        raise DiffcError(
            f"this {type(backbone).__name__} holds quantizers already",
            fix="load the unquantized model again",
        )
    return _convertible(backbone, _layer_base())


def _convertible(backbone: nn.Module, base: type) -> list[str]:
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    found = ((name, QuantModuleRegistry.get(type(module))) for name, module in backbone.named_modules())
    return [name for name, cls in found if cls is not None and issubclass(cls, base)]


def convert_layers(backbone: nn.Module, paths: list[str]) -> None:
    """Give the modules at `paths` (linear, convolution or attention) their quantizers, in place and off."""
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
