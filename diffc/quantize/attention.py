"""Attention with quantized q, k and v: in every class that goes through diffusers' attention dispatch.

ModelOpt lists the attention classes that it knows. All others of diffusers share a base class and one function,
`scaled_dot_product_attention`, which they reach through diffusers' attention dispatch; ModelOpt's quantizers stand in
front of it whatever the class. An attention that never calls it (Sana's linear one) is calibrated to nothing, and
stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_SUFFIX = "_bmm_quantizer"


def attention_layers(backbone: nn.Module) -> list[str]:
    """Paths of the attention modules whose q, k and v can run in FP8: heads of a multiple of 16.

    TensorRT has FP8 attention kernels for such heads only (ModelOpt, `check_conv_and_mha`).
    """
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.plugins.diffusion.diffusers import _QuantAttention

    _register_classes(backbone)
    found = []
    for path, module in backbone.named_modules():
        cls = QuantModuleRegistry.get(type(module))
        size = head_size(module) if cls is not None and issubclass(cls, _QuantAttention) else 0
        if size and size % 16 == 0:
            found.append(path)
    return found


def _register_classes(backbone: nn.Module) -> None:
    """Tell ModelOpt of the attention classes of `backbone` that it does not list."""
    from diffusers.models.attention import AttentionModuleMixin
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.plugins.diffusion.diffusers import _QuantAttentionModuleMixin

    for cls in dict.fromkeys(type(module) for module in backbone.modules()):
        if issubclass(cls, AttentionModuleMixin) and QuantModuleRegistry.get(cls) is None:
            QuantModuleRegistry.register({cls: f"{cls.__module__}.{cls.__qualname__}"})(
                _QuantAttentionModuleMixin
            )


def head_size(attention: Any) -> int:
    """Channels of one head; 0 where the module does not tell."""
    import torch

    if stated := getattr(attention, "head_dim", 0):
        return int(stated)
    heads = getattr(attention, "heads", 0) or getattr(attention, "num_heads", 0)
    width = getattr(attention, "inner_dim", 0)
    if not width:  # the first layer is the one that makes q
        linear = (child for child in attention.children() if isinstance(child, torch.nn.Linear))
        width = next((child.out_features for child in linear), 0)
    return int(width) // int(heads) if heads else 0


@contextmanager
def attention_as(function: Callable[..., Any]) -> Iterator[None]:
    """While this is open, quantized attention is `function`(module, query, key, value, ...).

    Its other arguments are those of scaled_dot_product_attention.
    """
    import torch
    from modelopt.torch.quantization.plugins.diffusion.diffusers import _QuantAttention

    functions = _QuantAttention._functionals_to_replace
    _QuantAttention._functionals_to_replace = [
        (torch.nn.functional, "scaled_dot_product_attention", function)
    ]
    try:
        yield
    finally:
        _QuantAttention._functionals_to_replace = functions


@contextmanager
def attention_by_default() -> Iterator[None]:
    """While this is open, quantized attention is `plain_attention`, unless `attention_as` has set another one."""
    from modelopt.torch.quantization.plugins.diffusion.diffusers import _QuantAttention, _quantized_sdpa

    own = any(function is _quantized_sdpa for *_, function in _QuantAttention._functionals_to_replace)
    with attention_as(plain_attention) if own else nullcontext():
        yield


def plain_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """What ModelOpt's quantized attention computes, without its checks: q, k and v are quantized, and the output.

    ModelOpt's own function drops `enable_gqa`, which diffusers' dispatch gives by name.
    """
    import torch

    # ModelOpt keeps here what it has replaced, and what others have patched before.
    attention = vars(torch.nn.functional)["_scaled_dot_product_attention"]
    query, key = module.q_bmm_quantizer(query), module.k_bmm_quantizer(key)
    value = module.v_bmm_quantizer(value)
    out: torch.Tensor = module.bmm2_output_quantizer(attention(query, key, value, *args, **kwargs))
    return out


def disable_unused(backbone: nn.Module) -> None:
    """Switch off the quantizers of attention that no calibration run has reached."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    for path, module in backbone.named_modules():
        watches = isinstance(module, TensorQuantizer) and path.endswith(_SUFFIX)
        if watches and module.is_enabled and getattr(module, "_amax", None) is None:
            module.disable()
