"""Calibration without a pipeline, a GPU or room for the model: one forward of random inputs, layer by layer.

The backbone has no weights; accelerate loads those of a module when it runs, and drops them afterwards. ModelOpt's
methods look at one layer at a time: at its weight, and at inputs that no quantizer has touched. So ModelOpt calibrates
each layer as a model of its own when the layer is called, and the result is that of ModelOpt on the whole model and
the same batch. Such scales serve to compile and to measure at full size. They say nothing about images, since random
inputs are not prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

from diffc.quantize.attention import attention_as, attention_layers, disable_unused, plain_attention
from diffc.quantize.calibrate import algorithm_of
from diffc.quantize.convert import (
    chosen_layers,
    convert_layers,
    enabled_quantizers,
    insert_quantizers,
)
from diffc.quantize.formats import Format
from diffc.quantize.kinds import Settings, kind_of
from diffc.quantize.options import QuantOptions
from diffc.quantize.scaling import portable_scaling
from diffc.quantize.simulate import cpu_block_quant
from diffc.quantize.state import SCALING, Amax, settings_of, usable_amax

if TYPE_CHECKING:
    import torch
    from torch import nn

Progress = Callable[[int, int], None]


def calibrate_synthetic(
    empty: nn.Module,
    weights: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Any],
    fmt: Format,
    unquantized: str,
    options: QuantOptions,
    progress: Progress,
) -> tuple[dict[str, Settings], dict[str, Amax], dict[str, Amax]]:
    """Settings, amax and scaling of every quantizer, as `Checkpoint` holds them.

    `empty` has parameters on the meta device and real buffers; `weights` are its tensors by name. `inputs` are the
    keyword arguments of one forward, in float32. Raises DiffcError as `usable_amax` does.
    """
    import torch
    from accelerate import cpu_offload

    paths = chosen_layers(empty, fmt, unquantized, options)
    attentions = attention_layers(empty) if options.quantizes_attention else []
    found = _Found()
    total = len(paths)

    def calibrate_layer(path: str) -> Callable[..., None]:
        def before(layer: Any, arguments: Any) -> None:
            if path not in found.done:
                _calibrate_layer(path, layer, weights, arguments[0], fmt, options, found)
                progress(len(found.done), total)

        return before

    for path in paths:
        empty.get_submodule(path).register_forward_pre_hook(calibrate_layer(path))
    convert_layers(empty, attentions)
    with _collecting(empty, fmt, options), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpu_offload(empty, execution_device=torch.device("cpu"), state_dict=weights)
        with torch.no_grad():
            empty(**inputs, return_dict=False)
    for name, quantizer in enabled_quantizers(empty).items():
        found.add(name, quantizer)
    return found.settings, found.amax, found.scaling


class _Found:
    """The quantizers that are calibrated so far, and the paths of their layers."""

    def __init__(self) -> None:
        self.settings: dict[str, Settings] = {}
        self.amax: dict[str, Amax] = {}
        self.scaling: dict[str, Amax] = {}
        self.done: set[str] = set()

    def add(self, name: str, quantizer: Any) -> None:
        """Note the state of one quantizer under its path in the whole model."""
        self.settings[name] = settings_of(quantizer.get_modelopt_state())
        kind = kind_of(self.settings[name])
        if kind.has_amax:
            self.amax[name] = usable_amax(name, getattr(quantizer, "_amax", None), kind).numpy()
        for item in SCALING:
            value = getattr(quantizer, f"_{item}", None)
            if value is not None:
                self.scaling[f"{name}.{item}"] = value.float().numpy()


def _calibrate_layer(
    path: str,
    layer: Any,
    weights: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    fmt: Format,
    options: QuantOptions,
    found: _Found,
) -> None:
    """Let ModelOpt calibrate the layer at `path`, with its weight and the input `x` that it has in the model."""
    import modelopt.torch.quantization as mtq
    import torch

    single = torch.nn.Sequential()
    single.add_module("layer", _copy_of(layer, path, weights))
    level = QuantOptions(**{**vars(options), "level": 3.0, "keep": (), "mha": False})
    insert_quantizers(single, fmt, r"$^", level)
    if fmt.algorithm is not None:
        with cpu_block_quant(), portable_scaling(), redirect_stdout(StringIO()):
            mtq.calibrate(single, algorithm_of(fmt, options), forward_loop=lambda model: model(x))
    for name, quantizer in enabled_quantizers(single).items():
        found.add(path + name.removeprefix("layer"), quantizer)
    for name, quantizer in single.named_modules():  # an input that is scaled and not quantized: int4_awq
        if hasattr(quantizer, "_pre_quant_scale") and not quantizer.is_enabled:
            key = f"{path}{name.removeprefix('layer')}.pre_quant_scale"
            found.scaling[key] = quantizer._pre_quant_scale.float().numpy()
    # ModelOpt's layers refer to themselves: without this the weights of all layers stay until Python collects cycles.
    for parameter in single.parameters():
        parameter.data = torch.empty(0)
    found.done.add(path)


def _copy_of(layer: Any, path: str, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """A new linear layer or convolution like the one at `path`, with its weights and without its hooks."""
    import torch

    has_bias = layer.bias is not None
    copy: Any
    with torch.device("meta"):
        if isinstance(layer, torch.nn.Linear):
            copy = torch.nn.Linear(layer.in_features, layer.out_features, has_bias)
        else:
            kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
            kind: Any = next(kind for kind in kinds if isinstance(layer, kind))
            copy = kind(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
                has_bias,
            )
    copy.weight = torch.nn.Parameter(weights[f"{path}.weight"], requires_grad=False)
    if has_bias:
        copy.bias = torch.nn.Parameter(weights[f"{path}.bias"], requires_grad=False)
    return copy.eval()  # type: ignore[no-any-return]


@contextmanager
def _collecting(backbone: nn.Module, fmt: Format, options: QuantOptions) -> Iterator[None]:
    """While this is open, the quantizers of attention watch q, k and v; afterwards they have their amax."""
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg
    from modelopt.torch.quantization.model_calib import enable_stats_collection, finish_stats_collection

    if not options.quantizes_attention:
        yield
        return
    rules = [rule for rule in options.rules(fmt) if "bmm" in rule["quantizer_name"]]
    set_quantizer_by_cfg(backbone, rules)
    enable_stats_collection(backbone)
    with attention_as(plain_attention):
        yield
    finish_stats_collection(backbone)
    disable_unused(backbone)
