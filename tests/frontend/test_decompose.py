"""Decomposition node by node: the same operators as torch's own way, the same numbers at sizes that differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _fx_passes

from diffc.frontend import decompose
from diffc.frontend.decompose import decomposed_by_node


class Mixed(nn.Module):
    """What backbones do between their layers: views of every kind, casts, products of unequal types."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, steps: torch.Tensor) -> Any:
        first, second = self.norm(x).chunk(2, dim=-1)
        turned = first.transpose(1, 2).reshape(x.shape[0], -1).contiguous()
        flat = second.flatten(1).clip(-1.0, 0.75).unflatten(1, (x.shape[1], 4)).flatten(1)
        angles = torch.outer(steps, torch.arange(3)).to(torch.float64).cos().to(x.dtype)
        scaled = self.drop(turned + flat * 2) * angles.sum() ** 2
        twice = torch.outer(self.drop(steps), steps)  # one tensor, by two names
        return self.drop(self.drop(scaled)), scaled.to(torch.float32), first, twice


class Writes(nn.Module):
    def forward(self, x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        made = x.flatten(1).clone()
        made[:, 0] = steps.sum()
        return made.add_(1.0)


class Brings(nn.Module):
    """Makes a tensor of its own, which is a constant of the graph."""

    def forward(self, x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) * torch.tensor([[2.5]])).reshape(-1) * torch.einsum("i,i->", steps, steps)


@contextmanager
def counted(name: str) -> Iterator[list[int]]:
    """How often a function of the exporter's passes is called."""
    calls, original = [0], getattr(_fx_passes, name)

    def call(*args: Any) -> Any:
        calls[0] += 1
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fx_passes, name, call)
        yield calls


def exported(module: nn.Module) -> Any:
    batch, rows = torch.export.Dim("batch", min=1), torch.export.Dim("rows", min=1)
    steps = torch.export.Dim("steps", min=1)
    shapes = {"x": {0: batch, 1: rows}, "steps": {0: steps}}
    args = (torch.randn(3, 5, 8), torch.randn(4))
    program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
    return torch.onnx.export(
        program, dynamo=True, opset_version=23, optimize=False, verbose=False
    ).model_proto


def results(model: Any, x: torch.Tensor, steps: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy(), "steps": steps.numpy()})


@pytest.mark.parametrize("kind", [Mixed, Writes, Brings])
def test_numbers_at_other_sizes(kind: type[nn.Module]) -> None:
    torch.manual_seed(3)
    module = kind().eval()
    with decomposed_by_node():
        model = exported(module)
    for sizes in ((1, 1, 1), (2, 7, 3)):
        x, steps = torch.randn(*sizes[:2], 8), torch.randn(sizes[2])
        expected = module(x, steps)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for value, wanted in zip(results(model, x, steps), expected, strict=True):
            np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=2e-5, atol=2e-6)
            assert value.std() > 0 or value.size == 1


def test_the_operators_are_those_of_torchs_own_way() -> None:
    module = Mixed().eval()
    whole = exported(module)
    with counted("decompose_with_registry") as calls, decomposed_by_node():
        alone = exported(module)
    assert calls == [0]  # the whole program was not run again
    kept = {
        "Identity",
        "Shape",
        "Gather",
        "Squeeze",
        "Concat",
        "Reshape",
        "Mul",
        "Constant",
    }  # views and sizes
    counts = [Counter(node.op_type for node in model.graph.node) for model in (alone, whole)]
    assert {op: n for op, n in counts[0].items() if op not in kept} == {
        op: n for op, n in counts[1].items() if op not in kept
    }
    assert sum(counts[0].values()) <= sum(counts[1].values())


def test_what_is_written_into_is_left_to_torch() -> None:
    with counted("decompose_with_registry") as calls, decomposed_by_node():
        exported(Writes().eval())
    assert calls == [1]


def test_the_exporter_is_as_before_at_the_end() -> None:
    def functions() -> tuple[Any, Any]:
        return _fx_passes.decompose_with_registry, _fx_passes.insert_type_promotion_nodes

    before, within = functions(), []

    def stop() -> None:
        with decomposed_by_node():
            within.extend(functions())
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop()
    assert within[0] is not before[0]
    assert within[1] is not before[1]
    assert functions() == before


def test_operators_that_export_can_translate_stay() -> None:
    ops = torch.ops.aten
    assert not decompose.is_expanded(ops.linear.default, {})
    assert not decompose.is_expanded(ops.layer_norm.default, {})
    assert decompose.is_expanded(ops.chunk.default, {})
    assert decompose.is_expanded(ops.silu.default, {ops.silu.default: lambda x: x})


def test_sizes_are_computed_from_those_of_the_inputs() -> None:
    """A size that is read off a layer's output would tie all that uses it to that layer."""
    with decomposed_by_node():
        graph = exported(Mixed().eval()).graph
    read = {node.input[0] for node in graph.node if node.op_type in ("Shape", "Size")}
    assert read
    assert read <= {value.name for value in graph.input}
