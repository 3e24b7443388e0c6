"""Validation of a model that does not fit into memory: both sides run layer by layer.

The torch reference has no weights of its own; accelerate loads those of each module from the files when it runs. The
compiled graph runs in segments. What is compared is the sharpest case alone, activations scaled and not rounded, at
one shape: any wrong weight, scale or wire shows in it. Hundreds of layers multiply float32 roundings beyond the limit
of small models; how far is measured on the reference itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch

from diffc.models.sources.backbone import DTYPES, build_backbone, quiet_libraries
from diffc.models.sources.locate import ModelSource
from diffc.models.sources.torch_weights import TorchWeights, fill_buffers
from diffc.models.spec import Shape
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.scaling import by_layer, scaled
from diffc.quantize.state import Scaling
from diffc.validate.compare import compare
from diffc.validate.float32 import feed, float32_twin, smooth_twin
from diffc.validate.reports import SMOOTH, ShapeReport
from diffc.validate.segmented import SEGMENT_BYTES, SegmentedSession
from diffc.validate.sequences import quantize_twice_as_graphs_do
from diffc.validate.shapes import fixed_batch
from diffc.validate.tolerances import SMOOTH_REL_L2, tolerance_of
from diffc.validate.torch_reference import Reference, noisy, validation_shapes


class StreamedReference(Reference):
    """`fidelity.Reference` whose weights stay in their files, but for those of the module that runs."""

    def __init__(self, source: ModelSource, dtype: str, checkpoint: Checkpoint | None):
        super().__init__(source, dtype, checkpoint, model=offloaded(source, dtype, checkpoint))


class ScaledWeights(Mapping[str, Any]):
    """The tensors of `weights`, the weights of layers with channel factors or branches changed accordingly."""

    def __init__(self, weights: Mapping[str, torch.Tensor], scaling: Scaling, dtype: torch.dtype):
        self._weights, self._scaling, self._dtype = weights, by_layer(scaling), dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        layer, _, kind = name.rpartition(".")
        weight = self._weights[name]
        if kind != "weight" or layer not in self._scaling:
            return weight
        return scaled(weight.to(self._dtype), self._scaling[layer]).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def offloaded(source: ModelSource, dtype: str, checkpoint: Checkpoint | None) -> torch.nn.Module:
    """`fidelity.reference_model`, weights loaded as each module runs: rounded to `dtype`, arithmetic in float32."""
    from accelerate import cpu_offload, init_empty_weights

    with quiet_libraries(), init_empty_weights(include_buffers=False):
        model = build_backbone(source.family, source.config, torch.float32)
    weights: Mapping[str, torch.Tensor] = TorchWeights(source.weights, DTYPES[dtype])
    fill_buffers(model, weights, DTYPES[dtype])
    if checkpoint is not None:
        checkpoint.apply(model, source.family.name)
        weights = ScaledWeights(weights, checkpoint.scaling, DTYPES[dtype])
        quantize_twice_as_graphs_do(model, DTYPES[dtype])
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=weights)
    return model


def validate_streamed(
    model: onnx.ModelProto, reference: Reference, *, format: str, seed: int, limit: int = SEGMENT_BYTES
) -> list[ShapeReport]:
    """One report, at the first validation shape; `limit` is the bytes of weights that a segment holds."""
    shape = validation_shapes(reference.source, fixed_batch(model))[0]
    smooth = reference.quantized
    graph = smooth_twin(model) if smooth else float32_twin(model)
    tolerance = SMOOTH_REL_L2 if smooth else tolerance_of(format, "float32")
    with quiet_libraries() if smooth else nullcontext():
        drawn, expected = reference.outputs(shape, seed, smooth=smooth)
    arrays: dict[str, Any] = {name: value.float().numpy() for name, value in drawn.items()}
    result = SegmentedSession(graph, limit).run(feed(graph, arrays))
    arithmetic = SMOOTH if smooth else "float32"
    rows = compare(expected, result, tolerance)
    report = ShapeReport(shape, arithmetic, rows, arrays, expected, result, seed=seed)
    if not report.passed:
        report = replace(report, floor=_floor(reference, shape, seed, smooth))
    return [report]


def _floor(reference: Reference, shape: Shape, seed: int, smooth: bool) -> float:
    """Relative L2 change of the output when every layer's is off by a float32 rounding: depth multiplies those.

    One run: without quantizers' roundings the change hardly depends on which roundings they are.
    """
    expected = reference.outputs(shape, seed, smooth=smooth)[1]
    with noisy(reference.model, 2.0**-23, 0):
        other = reference.forward(shape, seed, smooth=smooth)[1]
    changes = (np.linalg.norm(other[n] - expected[n]) / np.linalg.norm(expected[n]) for n in expected)
    return float(max(changes))
