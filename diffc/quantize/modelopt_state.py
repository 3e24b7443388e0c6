"""Lets a backbone that diffc has quantized be saved and restored by ModelOpt (`mto.save`, `mto.restore`).

ModelOpt restores a model by doing again what was done: its mode "quantize" gives every module of a registered class
quantizers, norms and attention as well, sets them by rules, and then wants the saved state of each one. diffc converts
few layers only (`diffc.quantize.convert`). So the mode is noted with one exact rule for each quantizer that is on.
Every module that diffc has left alone gets the quantizers that ModelOpt would give it, switched off. They hold no
value, and the module, whose class stays as it is, does not run them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffc.quantize.convert import enabled_quantizers
from diffc.quantize.state import attributes_of, settings_of

if TYPE_CHECKING:
    from torch import nn


def record_quantize_mode(backbone: nn.Module) -> None:
    """Note ModelOpt's mode "quantize" on a backbone whose quantizers are set, before it is calibrated.

    Does nothing where a mode is noted already.
    """
    from modelopt.torch.opt.conversion import ModeloptStateManager
    from modelopt.torch.quantization.config import QuantizeConfig
    from modelopt.torch.quantization.conversion import update_quantize_metadata

    if ModeloptStateManager.is_converted(backbone):
        return
    config = QuantizeConfig(quant_cfg=_rules(backbone), algorithm=None)
    _add_idle_quantizers(backbone)
    metadata: dict[str, Any] = {}
    update_quantize_metadata(backbone, config, metadata)
    ModeloptStateManager(backbone, init_state=True).add_mode("quantize", config, metadata)


def _rules(backbone: nn.Module) -> list[dict[str, Any]]:
    """ModelOpt's `quant_cfg`: all off, then every quantizer that is on by its own name; sequences as lists."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, quantizer in enabled_quantizers(backbone).items():
        owner, _, last = name.rpartition(".")
        found.setdefault(owner if last.isdigit() else name, []).append(
            attributes_of(settings_of(quantizer.get_modelopt_state()))
        )
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    return rules + [
        {"quantizer_name": name, "cfg": cfg if len(cfg) > 1 else cfg[0]} for name, cfg in found.items()
    ]


def _add_idle_quantizers(backbone: nn.Module) -> None:
    """Give every module that ModelOpt would convert, and diffc has not, its quantizers, off."""
    from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry

    for module in list(backbone.modules()):
        if not isinstance(module, QuantModule) and type(module) in QuantModuleRegistry:
            for name, quantizer in _quantizers_of(module):
                quantizer.disable()
                module.add_module(name, quantizer)


def _quantizers_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The quantizers that ModelOpt gives a module, found on a shallow copy, which shares all tensors."""
    from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer

    twin: Any = copy.copy(module)
    for part in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[part] = dict(module.__dict__[part])
    converted: Any = QuantModuleRegistry.convert(twin)
    for name, child in converted.named_children():
        if isinstance(child, TensorQuantizer):
            yield name, child
