"""Small networks of equal blocks: those that repeat, and those that only seem to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffc.frontend.blocks import Run, find_runs, shortened


class Block(nn.Module):
    def __init__(self, size: int, slope: float = 0.1) -> None:
        super().__init__()
        self.linear, self.slope = nn.Linear(size, size), slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.leaky_relu(self.linear(x), self.slope)


Forward = Callable[[Any, torch.Tensor], torch.Tensor]


class Network(nn.Module):
    def __init__(self, forward: Forward, count: int = 7) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(6) for _ in range(count))
        self.end, self.function = nn.Linear(6, 3), forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.end(self.function(self, x))
        return result


def chain(network: Any, x: torch.Tensor) -> torch.Tensor:
    for block in network.blocks:
        x = block(x)
    return x


def shared(network: Any, x: torch.Tensor) -> torch.Tensor:
    """All blocks read what comes before them, what the first made, and the number of rows."""
    first = None
    for block in network.blocks:
        x = block(x) + x.shape[0]
        first = x if first is None else first
        x = block.linear(first) + x
    return x + first


def between(network: Any, x: torch.Tensor) -> torch.Tensor:
    """Work of the network's own between blocks, on what the last one made."""
    for block in network.blocks:
        y = block(x)
        x = torch.cat([y[:, 3:] * 0.5, y[:, :3]], 1)
    return x


def around(network: Any, x: torch.Tensor) -> torch.Tensor:
    """The same on what a block has read."""
    for block in network.blocks:
        x = torch.cat([block(x)[:, :3], x[:, :3] * 0.5], 1)
    return x


def collected(network: Any, x: torch.Tensor) -> torch.Tensor:
    """Two results go from block to block, and one of the last block's is not used."""
    total = x
    for block in network.blocks:
        x = block(x)
        total = total + x
    return total


def numbered(network: Any, x: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(network.blocks):
        x = block(x) * (number + 1.5)
    return x


def alternating(network: Any, x: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(network.blocks):
        x = block(x) * (0.5 if number % 2 else 0.25)
    return x


def every_third(network: Any, x: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(network.blocks):
        x = block(-x if number % 3 == 2 else x)
    return x


def once(network: Any, x: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(network.blocks):
        x = block(x)
        x = x if number else x * 0.5
    return x


def all_but_last(network: Any, x: torch.Tensor) -> torch.Tensor:
    for number, block in enumerate(network.blocks):
        x = block(x)
        x = x if number == 2 else x * 0.5
    return x


def two_back(network: Any, x: torch.Tensor) -> torch.Tensor:
    """After the second block x is read again, as something that all share would be."""
    seen = [x, x]
    for block in network.blocks:
        seen.append(block(seen[-1]) * seen[-2])
    return seen[-1]


def gathered(network: Any, x: torch.Tensor) -> torch.Tensor:
    seen = [x]
    for block in network.blocks:
        seen.append(block(seen[-1]))
    return sum(seen[1:], x)


def second_last(network: Any, x: torch.Tensor) -> torch.Tensor:
    seen = [x]
    for block in network.blocks:
        seen.append(block(seen[-1]))
    return seen[-1] + seen[-2]


def third_last(network: Any, x: torch.Tensor) -> torch.Tensor:
    seen = [x]
    for block in network.blocks:
        seen.append(block(seen[-1]))
    return seen[-1] + seen[-3]


def picked(network: Any, x: torch.Tensor) -> torch.Tensor:
    """What the last block computes on its way is a result."""
    for block in network.blocks:
        y = block.linear(x)
        x = torch.relu(y) * y
    return x + y


def exported(network: nn.Module, runs: Sequence[Run], mode: FakeTensorMode) -> Any:
    with mode, shortened(network, runs), torch.no_grad():
        x = torch.randn(5, 6)
        dynamic = ({0: torch.export.Dim("rows", min=1, max=64)},)
        program = torch.export.export(network, (x,), dynamic_shapes=(dynamic[0],), strict=False)
        return torch.onnx.export(program, dynamo=True, opset_version=23, optimize=False, verbose=False)


def fake(forward: Forward) -> tuple[nn.Module, list[Run], Any]:
    """A network on fake tensors, its runs and its ONNX program without the blocks that they leave out."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        network = Network(forward).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    runs = find_runs(network)
    return network, runs, exported(network, runs, mode)


REPEATING = (chain, shared, between, around, collected)
NOT_REPEATING = (
    *(numbered, alternating, every_third, once, all_but_last),
    *(two_back, gathered, second_last, third_last, picked),
)
