"""Gradients through simulated formats: those of the network whose roundings are frozen, by finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

from diffc.quantize.calibrate import algorithm_of
from diffc.quantize.convert import enabled_quantizers, insert_quantizers
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import QuantOptions
from diffc.quantize.simulate import cpu_block_quant

OPTIONS = QuantOptions(lowrank=4)
STEP = 1e-2


def network(format: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Two linear layers and what is between them, quantized and calibrated; inputs, and a target."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 128))
    x, target = torch.randn(32, 128), torch.randn(32, 128)
    insert_quantizers(net, FORMATS[format], r"$^", OPTIONS)
    if FORMATS[format].algorithm:
        with torch.no_grad(), cpu_block_quant(), redirect_stdout(StringIO()):
            mtq.calibrate(net, algorithm_of(FORMATS[format], OPTIONS), forward_loop=lambda n: n(x))
    return net, x, target


def loss(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    with cpu_block_quant():
        return (net(x) - target).square().mean()


@contextmanager
def frozen_rounding(net: nn.Module, x: Tensor) -> Iterator[None]:
    """While this is open, every quantizer adds to its input what it added for the weights of now: it rounds no more.

    A rounded network is a staircase, whose own derivative is zero nearly everywhere. The straight-through gradient is
    the derivative of this network, which is smooth and has the same value.
    """
    added: dict[str, Tensor] = {}
    quantizers = enabled_quantizers(net)

    def scaled(quantizer: Any, value: Tensor) -> Tensor:
        factor = quantizer.pre_quant_scale
        return value if factor is None else value * factor

    def note(name: str) -> Any:
        def hook(quantizer: Any, inputs: Any, output: Tensor) -> None:
            added[name] = (output - scaled(quantizer, inputs[0])).detach()

        return hook

    def add(name: str) -> Any:
        return lambda quantizer, inputs, _: scaled(quantizer, inputs[0]) + added[name]

    handles = [q.register_forward_hook(note(name)) for name, q in quantizers.items()]
    with torch.no_grad(), cpu_block_quant():
        net(x)
    for handle in handles:
        handle.remove()
    handles = [q.register_forward_hook(add(name)) for name, q in quantizers.items()]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("format", [name for name, fmt in FORMATS.items() if fmt.quantizes])
def test_gradients_are_those_of_finite_differences(format: str) -> None:
    net, x, target = network(format)
    exact = loss(net, x, target)
    exact.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(net.named_parameters()).keys()
    generator = torch.Generator().manual_seed(4)
    with frozen_rounding(net, x), torch.no_grad():
        assert float(loss(net, x, target)) == pytest.approx(float(exact), rel=1e-4)
        for name, parameter in net.named_parameters():
            for direction in (gradients[name], torch.randn(parameter.shape, generator=generator)):
                unit = direction / direction.norm()
                begin = parameter.detach().clone()
                values = []
                for side in (1, -1):
                    parameter.copy_(begin + side * STEP * unit)
                    values.append(float(loss(net, x, target).double()))
                parameter.copy_(begin)
                slope, expected = (values[0] - values[1]) / (2 * STEP), float((gradients[name] * unit).sum())
                largest = float(gradients[name].norm())
                assert abs(slope - expected) < 0.01 * largest + 2e-5, (name, slope, expected)
