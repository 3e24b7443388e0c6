"""Weights that come while their layer runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffc.quantize.stream import WeightStream

CPU = torch.device("cpu")


class Model(nn.Module):
    """A table of its own, a layer that is called twice, and one that is read without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.table = nn.Parameter(torch.empty(6))
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.again = nn.Linear(8, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.reads = False

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.norm(self.first(self.words(numbers) + self.table))
        x = self.again(self.again(x))
        x = self.attention(x, x, x)[0]
        return x @ self.again.weight if self.reads else x


def made(seed: int) -> tuple[Model, dict[str, Tensor], Tensor]:
    torch.manual_seed(seed)
    model = Model()
    nn.init.normal_(model.table)
    return model.eval(), {n: t.clone() for n, t in model.state_dict().items()}, torch.randint(0, 11, (3, 5))


@pytest.mark.parametrize("room", [0, 8 * 8 * 4, 1 << 20])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_streamed_model_computes_the_same_bits(stored: torch.dtype, room: int) -> None:
    model, state, numbers = made(3)
    state = {name: tensor.to(stored) for name, tensor in state.items()}
    model.load_state_dict(state)
    with torch.no_grad():
        expected = model(numbers)
    reads: list[str] = []
    with torch.device("meta"):
        empty = Model().eval()

    def read(name: str) -> Tensor:
        reads.append(name)
        return state[name]

    stream = WeightStream(empty, read, CPU, room=room)
    with torch.no_grad():
        assert torch.equal(empty(numbers), expected)
        before = len(reads)
        assert torch.equal(empty(numbers), expected)
    again = {0: 4, 8 * 8 * 4: 3, 1 << 20: 0}[room]  # of 256 bytes, `first` has 192
    assert len(reads) - before == again
    stream.close()


def test_a_weight_that_is_read_without_its_layer_spoils_the_result() -> None:
    model, state, numbers = made(4)
    model.reads = True
    WeightStream(model, state.__getitem__, CPU)
    with torch.no_grad():
        result = model(numbers)
    assert model.again.weight.shape == (8, 8)
    assert result.isnan().all()


def test_what_a_method_changes_is_dropped_and_its_scaling_kept() -> None:
    model, state, _ = made(5)
    stream = WeightStream(model, state.__getitem__, CPU)
    quantizer: Any = nn.Module()
    quantizer.register_buffer("_pre_quant_scale", torch.rand(6) + 0.5)
    layer: Any = model.first
    with stream.access(layer):
        assert torch.equal(layer.weight, state["first.weight"])
        layer.weight.data.mul_(3)
        layer.input_quantizer = quantizer
        with stream.access(layer):  # ModelOpt's methods call each other
            pass
        assert torch.equal(layer.weight, state["first.weight"] * 3)
    assert layer.weight.isnan().all()
    x = torch.randn(4, 6)
    expected = x @ (state["first.weight"] * (1.0 / quantizer._pre_quant_scale)).T + state["first.bias"]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
