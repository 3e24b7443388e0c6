"""What a checkpoint carries of a trained backbone: values that round to themselves, whatever the compute type."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import nn

from diffc.quantize.calibrate import algorithm_of
from diffc.quantize.convert import insert_quantizers
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import QuantOptions
from diffc.quantize.simulate import cpu_block_quant
from diffc.train.student import settled
from tests.backbones import make_portable


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [name for name, fmt in FORMATS.items() if fmt.quantizes])
def test_settled_weights_round_to_themselves_in_16_bits(format: str, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    options = QuantOptions(lowrank=4)
    net = nn.Sequential(nn.Linear(256, 64))
    insert_quantizers(net, FORMATS[format], r"$^", options)
    if FORMATS[format].algorithm:
        with torch.no_grad(), cpu_block_quant(), redirect_stdout(StringIO()):
            mtq.calibrate(net, algorithm_of(FORMATS[format], options), lambda n: n(torch.randn(32, 256)))
        make_portable(net)
    layer = net[0]
    with torch.no_grad():  # as after training: grown past amax here and there
        layer._parameters["weight"].mul_(1 + 0.05 * torch.randn(64, 256))
    values = settled(layer, dtype)
    weight = layer._parameters["weight"].detach()
    with torch.no_grad(), cpu_block_quant():
        exact = layer.weight_quantizer(weight)
        again = layer.weight_quantizer(values.to(dtype).float())
    assert torch.equal(values.to(dtype).float(), values)  # 16 bits hold them
    assert torch.equal(again, exact)
    assert not torch.equal(values, weight)
