"""Translations: ONNX Runtime computes on their nodes what torch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.frontend.translations import translations


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def _unequal(x: torch.Tensor) -> Any:
    a, b, c = x.split([1, 2, 5], dim=1)
    return a * 2 + b.sum(1, keepdim=True) - c[:, :1] * b[:, 1:]


def _chunks(x: torch.Tensor) -> Any:
    first, second = x.chunk(2, dim=-1)
    return first * torch.sigmoid(second)


def _uneven(x: torch.Tensor) -> Any:
    pieces = x.split(3, dim=1)
    return torch.cat([p.sum(1, keepdim=True) for p in pieces], dim=1)


@pytest.mark.parametrize(
    ("function", "kinds", "operators"),
    [
        (_unequal, [torch.float32], {"Slice"}),
        (_chunks, [torch.float32], {"Split"}),
        (_uneven, [torch.float32], {"Slice", "Concat"}),
        (lambda a, b: torch.cat([a, b], dim=1) * 2, [torch.float16, torch.float32], {"Cast", "Concat"}),
        (lambda a, b: torch.concat([a, b], dim=1) * 2, [torch.float16, torch.float32], {"Cast", "Concat"}),
        (
            lambda a, b: torch.nn.functional.rms_norm(a, (8,), b[0], 1e-6),
            [torch.float32, torch.float16],
            {"RMSNormalization", "Cast"},
        ),
        (lambda a: torch.nn.functional.rms_norm(a, (8,)), [torch.float32], {"RMSNormalization"}),
        (lambda a: torch.einsum("nhw->nwh", a.reshape(a.shape[0], 2, 4)), [torch.float32], {"Transpose"}),
        (lambda a, b: torch.einsum("nc,nc->n", a, b), [torch.float32] * 2, {"Einsum"}),
        (lambda a: torch.ops.aten.squeeze.dim(a, 1) * 2, [torch.float32], {"Mul"}),
        (lambda a: torch.ops.aten.squeeze.dim(a[:, :1], 1) * 2, [torch.float32], {"Squeeze"}),
        (lambda a: (a > 0).masked_fill(a > 1, False).float() * a, [torch.float32], {"And", "Not"}),
        (lambda a: (a > 0).masked_fill(a < -1, True).float() * a, [torch.float32], {"Or"}),
        (lambda a: a.masked_fill(a > 0.5, -3.0), [torch.float32], {"Where"}),
        (lambda a, b: torch.where(a > 0, b > 0, a < -1).float() * a, [torch.float32] * 2, {"And", "Or"}),
        (lambda a, b: torch.where(a > 0, b, a), [torch.float32] * 2, {"Where"}),
        (
            lambda a: a[0].reshape(2, 4).repeat_interleave(a.shape[0], dim=0),
            [torch.float32],
            {"Expand"},
        ),
        (lambda a: a.repeat_interleave(3, dim=1), [torch.float32], {"Expand"}),
        (lambda a: a[:, None].repeat_interleave(a.shape[0], dim=-2), [torch.float32], {"Expand"}),
        (lambda a: (a * 2).repeat_interleave(2), [torch.float32], {"Expand"}),
    ],
)
def test_translations_compute_what_torch_does(
    function: Callable[..., Any], kinds: list[torch.dtype], operators: set[str], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(9)
    inputs = tuple(torch.randn(5, 8, generator=generator).to(kind) for kind in kinds)
    dynamic = tuple({0: torch.export.Dim("n", min=1, max=64)} for _ in inputs)
    program = torch.onnx.export(
        torch.export.export(Call(function), inputs, dynamic_shapes=(dynamic,)),
        dynamo=True,
        opset_version=23,
        optimize=False,
        verbose=False,
        custom_translation_table=translations(),
    )
    program.model.ir_version = 11
    model = program.model_proto
    onnx.save(model, tmp_path / "m.onnx")
    found = {node.op_type for node in model.graph.node}
    assert operators <= found
    assert not found & {"SplitToSequence", "SequenceAt"}
    fed = tuple(torch.randn(7, 8, generator=generator).to(kind) for kind in kinds)
    with OrtSession(tmp_path / "m.onnx") as session:
        names = [value.name for value in model.graph.input]
        result = session.run({n: v.numpy() for n, v in zip(names, fed, strict=True)})
    expected = function(*fed)
    (output,) = result.values()
    assert output.dtype == expected.numpy().dtype
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-5, atol=1e-5)
