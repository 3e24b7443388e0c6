"""Validation of a model that does not fit into memory: both sides run layer by layer.

The torch reference has no weights of its own; accelerate loads those of each module from the files when it runs. The
compiled graph runs in pieces. Only the sharpest case is compared, at one shape: activations scaled and not rounded. Any
wrong weight, scale or connection shows in it. Hundreds of layers multiply float32 roundings beyond the limit of small
models; how far is measured on the reference itself.
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
from diffc.progress import Update
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.scaling import by_layer, scaled
from diffc.validate.compare import compare
from diffc.validate.float32 import feed, float32_copy, unrounded_copy
from diffc.validate.outputs import ROUNDING, as_float32, require_alive
from diffc.validate.reports import UNROUNDED, ShapeReport
from diffc.validate.segmented import PIECE_BYTES, SegmentedSession
from diffc.validate.shapes import fixed_batch
from diffc.validate.tolerances import UNROUNDED_REL_L2, tolerance_of
from diffc.validate.torch_hooks import counted_calls, noisy, quantize_twice_as_graphs_do
from diffc.validate.torch_reference import TorchReference, validation_shapes


class StreamedReference(TorchReference):
    """A TorchReference whose weights stay in their files, except those of the module that runs."""

    def __init__(self, source: ModelSource, dtype: str, checkpoint: Checkpoint | None):
        super().__init__(source, dtype, checkpoint, model=offloaded(source, dtype, checkpoint))


class CheckpointWeights(Mapping[str, Any]):
    """The tensors of `weights` as `Checkpoint.apply` makes them, in float32: scaled, or what the checkpoint carries."""

    def __init__(self, weights: Mapping[str, torch.Tensor], checkpoint: Checkpoint, dtype: torch.dtype):
        scaling = checkpoint.scaling if checkpoint.scales_weights else {}
        self._weights, self._scaling, self._dtype = weights, by_layer(scaling), dtype
        self._carried = TorchWeights(checkpoint.weights, dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._carried:
            return self._carried[name]
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
    """`torch_reference.reference_model` that loads the weights of each module when it runs."""
    from accelerate import cpu_offload, init_empty_weights

    with quiet_libraries(), init_empty_weights(include_buffers=False):
        model = build_backbone(source.family, source.config, torch.float32)
    weights: Mapping[str, torch.Tensor] = TorchWeights(source.weights, DTYPES[dtype], source.exact)
    if checkpoint is not None:
        weights = CheckpointWeights(weights, checkpoint, DTYPES[dtype])
    fill_buffers(model, weights, DTYPES[dtype])
    if checkpoint is not None:
        replace(checkpoint, weights={}).apply(model, source.family.name)  # `weights` has them
        quantize_twice_as_graphs_do(model, DTYPES[dtype])
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=weights)
    return model


def validate_streamed(
    model: onnx.ModelProto,
    reference: TorchReference,
    *,
    format: str,
    seed: int,
    shape: Shape | None = None,
    limit: int = PIECE_BYTES,
    update: Update = lambda done, total: None,
) -> list[ShapeReport]:
    """One report, at `shape` (None: the first validation shape).

    `limit` is the bytes of weights that a piece of the graph holds. Raises MismatchError when the outputs do not depend
    on the inputs, which takes a second run of the graph.
    """
    shape = shape or validation_shapes(reference.source, fixed_batch(model))[0]
    unrounded = reference.quantized
    graph = unrounded_copy(model) if unrounded else float32_copy(model)
    tolerance = UNROUNDED_REL_L2 if unrounded else tolerance_of(format, "float32")
    counted = counted_calls(reference.model, lambda done, total: update(done, 2 * total))
    with quiet_libraries() if unrounded else nullcontext(), counted:
        drawn, expected = reference.outputs(shape, seed, unrounded=unrounded)
    arrays = as_float32(drawn)
    session = SegmentedSession(graph, limit)
    result = session.run(feed(graph, arrays), lambda done, total: update(total + done, 2 * total))
    arithmetic = UNROUNDED if unrounded else "float32"
    rows = compare(expected, result, tolerance)
    report = ShapeReport(shape, arithmetic, rows, arrays, expected, result, seed=seed)
    require_alive(graph, session, report)
    if not report.passed:
        report = replace(report, floor=_floor(reference, shape, seed, unrounded))
    return [report]


def _floor(reference: TorchReference, shape: Shape, seed: int, unrounded: bool) -> float:
    """Relative L2 change of the output when every layer's output is off by a float32 rounding.

    One run is enough: without the roundings of quantizers the change hardly depends on the noise.
    """
    expected = reference.outputs(shape, seed, unrounded=unrounded)[1]
    with noisy(reference.model, ROUNDING["float32"], 0):
        other = reference.forward(shape, seed, unrounded=unrounded)[1]
    changes = (np.linalg.norm(other[n] - expected[n]) / np.linalg.norm(expected[n]) for n in expected)
    return float(max(changes))
