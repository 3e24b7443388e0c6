"""The quantized backbone in training: which tensors learn, and what of it a checkpoint carries in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffc.models.sources.backbone import load_backbone
from diffc.models.sources.source import ModelSource
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import enabled_quantizers, layer_of, role_of
from diffc.quantize.simulate import cpu_block_quant
from diffc.tensors import recipe_of_tensor
from diffc.train.low_rank import add_low_rank, merge_low_rank
from diffc.train.request import TrainPlan
from passes.weights.recipe import Recipe

State = Mapping[str, Tensor]
"""The tensors that learn, by name, in float32 on the CPU."""


def student_of(plan: TrainPlan, checkpoint: Checkpoint) -> nn.Module:
    """The backbone with the quantizers of `checkpoint`, in float32 on the CPU, ready to learn.

    All weights, biases and norms learn, or only a low-rank addition to each quantized weight. Scales, channel factors
    and low-rank branches of the format stay as calibration has found them. Dropout is off.
    """
    request, source = plan.request, plan.source
    model: Any = load_backbone(source, torch.float32)
    checkpoint.apply(model, source.family.name)
    model.requires_grad_(not request.low_rank)
    if request.low_rank:
        add_low_rank(model, quantized_layers(model), request.rank, request.seed)
    if request.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    student: nn.Module = model.eval()
    return student


def quantized_layers(model: nn.Module) -> list[str]:
    """Paths of the layers whose weights are rounded, in module order."""
    names = (name for name in enabled_quantizers(model) if role_of(name) == "weight_quantizer")
    return list(dict.fromkeys(map(layer_of, names)))


def learning(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that learn, by name."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the tensors that learn."""
    return {name: parameter.detach().float().cpu().clone() for name, parameter in learning(model)}


def put_state(model: nn.Module, state: State) -> None:
    """Give the tensors that learn the values of `state`."""
    with torch.no_grad():
        for name, parameter in learning(model):
            parameter.copy_(state[name])


def trained_weights(model: nn.Module, source: ModelSource) -> dict[str, Recipe]:
    """What a checkpoint carries of a trained model: every tensor that has changed, ready for any compute type.

    Low-rank additions are merged into their weights. A quantized weight is stored as the values that its quantizer
    rounds it to, in the type of the model's files: they round to themselves, in 16 bits as well. A float32 weight that
    lies at the edge between two steps, where training leaves many, would fall to the other side. Other tensors stay in
    float32. `model` ends with these values.
    """
    merge_low_rank(model)
    before = load_backbone(source, torch.float32).state_dict()
    quantized = {f"{path}.weight" for path in quantized_layers(model)}
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(source.dtype, torch.float32)
    found = {}
    for name, parameter in model.named_parameters():
        if name in before and not torch.equal(parameter.detach().cpu(), before[name]):
            if name in quantized:
                parameter.data = settled(model.get_submodule(name.removesuffix(".weight")), dtype)
            found[name] = recipe_of_tensor(
                _narrow(parameter.detach(), dtype) if name in quantized else parameter
            )
    return found


def settled(layer: Any, dtype: torch.dtype) -> Tensor:
    """The values that a layer's quantizer rounds its weight to, as `dtype` holds them, in the weight's own type.

    Of a weight that goes through several quantizers (w4a8), those after the first, whose steps are the coarse ones. A
    weight whose values do not round to themselves again stays as it is; block scales in the last bits of E4M3 may not.
    """
    weight: Tensor = layer._parameters["weight"].detach()
    quantizer = layer.weight_quantizer
    first = quantizer[0] if isinstance(quantizer, nn.Sequential) else quantizer
    with torch.no_grad(), cpu_block_quant():
        rounded = first(weight)
        narrow: Tensor = rounded.to(dtype).to(weight.dtype)
        same = torch.equal(first(narrow), rounded)
        return narrow if same else weight


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` where that loses nothing."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
