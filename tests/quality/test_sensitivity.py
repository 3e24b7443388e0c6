"""Noise at the output of a backbone, by the layers that are quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffc.quality.sensitivity import noise_of, recording, replaced, run, sharing_inputs


class Backbone(nn.Module):
    """q, k and v of one tensor, and two layers of equal tensors that are not the same one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        for name in ("to_q", "to_k", "to_v", "left", "right"):
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor]:
        y = self.to_v(x) * torch.softmax(self.to_q(x) * self.to_k(x), -1)
        return (scale * (self.left(y + 1) + self.right(y + 1)),)


def test_layers_that_read_one_tensor_are_a_group_and_noise_is_theirs() -> None:
    backbone: Any = Backbone()
    with recording(backbone, every=2) as calls:
        for number in range(5):
            backbone(torch.randn(3, 6), scale=torch.tensor(float(number + 1)))
    assert [float(call.kwargs["scale"]) for call in calls] == [1.0, 3.0, 5.0]
    assert noise_of(backbone, calls) == 0
    paths = ["left", "right", "to_k", "to_q", "to_v"]
    assert sharing_inputs(backbone, calls[0], paths) == [("to_v", "to_q", "to_k"), ("left",), ("right",)]
    other = nn.Linear(6, 6)
    other.load_state_dict(backbone.left.state_dict())
    other.bias.data += 0.25
    with replaced(backbone, {"left": other}):
        found = noise_of(backbone, calls)
    assert noise_of(backbone, calls) == 0
    expected = [
        float((0.25 * call.kwargs["scale"]).square() * call.answer.numel() / call.answer.square().sum())
        for call in calls
    ]
    assert found == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert torch.equal(run(backbone, calls[1]), calls[1].answer)
