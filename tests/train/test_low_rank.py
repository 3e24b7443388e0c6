"""Low-rank additions: nothing at first, learned under gradient checkpointing as without, merged in the end."""

from __future__ import annotations

import torch

from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.simulate import cpu_block_quant
from diffc.train.low_rank import NAME, add_low_rank, merge_low_rank
from diffc.train.student import learning, quantized_layers
from tests.backbones import backbone_of, forward, inputs_of
from tests.quantize.test_checkpoint import calibrated

RANK = 3


def student(checkpointing: bool = False) -> torch.nn.Module:
    made = Checkpoint.from_backbone(calibrated("flux", "int8"), family="flux", format="int8")
    model = backbone_of("flux")
    made.apply(model, "flux")
    model.requires_grad_(False)
    add_low_rank(model, quantized_layers(model), RANK, seed=5)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def grown(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a loss with respect to what learns, after `up` has left zero."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in learning(model):
            if name.endswith("up"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    with cpu_block_quant():
        model(**inputs_of("flux", 1), return_dict=False)[0].square().mean().backward()
    return {name: parameter.grad for name, parameter in learning(model)}


def test_additions_begin_with_nothing_and_are_merged_exactly() -> None:
    model = student()
    plain = backbone_of("flux")
    Checkpoint.from_backbone(calibrated("flux", "int8"), family="flux", format="int8").apply(plain, "flux")
    assert torch.equal(forward(model, "flux"), forward(plain, "flux"))
    gradients = grown(model)
    assert len(gradients) == 2 * len(quantized_layers(model)) > 16
    assert all(value is not None and bool(value.any()) for value in gradients.values())
    before = forward(model, "flux")
    assert not torch.equal(before, forward(plain, "flux"))
    merge_low_rank(model)
    assert torch.equal(forward(model, "flux"), before)
    assert not any(NAME in name for name, _ in model.named_parameters())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    one, other = grown(student()), grown(student(checkpointing=True))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-8)
