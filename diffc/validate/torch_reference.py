"""The torch model that compiled graphs are compared with: ModelOpt's fake quantization, arithmetic in float32."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffc.models.batched import batched_forward
from diffc.models.inputs import forward_kwargs, random_inputs, tensors_of
from diffc.models.sources.backbone import DTYPES, load_backbone
from diffc.models.sources.locate import ModelSource
from diffc.models.spec import Shape
from diffc.quantize.attention import attention_by_default
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.simulate import cpu_block_quant
from diffc.tensors import tensor_of
from diffc.validate.outputs import FLOOR_RUNS, Drawn, Outputs, as_float32
from diffc.validate.shapes import usual_shapes
from diffc.validate.torch_hooks import (
    noisy,
    quantize_twice_as_graphs_do,
    quantized_softmax,
    without_rounding,
)


def validation_shapes(source: ModelSource, batch: int | None = None) -> tuple[Shape, ...]:
    """`usual_shapes` of a model for which no engine is built."""
    return usual_shapes(source.family, source.config, batch)


def validation_arrays(
    source: ModelSource, dtype: str, seed: int, batch: int | None = None
) -> list[dict[str, npt.NDArray[Any]]]:
    """Random inputs at both validation shapes, as float32 arrays whose values `dtype` holds exactly."""
    spec = source.family
    shapes = validation_shapes(source, batch)
    values = (random_inputs(spec, source.config, s, dtype=DTYPES[dtype], seed=seed) for s in shapes)
    return [as_float32(v) for v in values]


def torch_outputs(
    model: torch.nn.Module, source: ModelSource, values: Drawn, *, batched: bool = False
) -> Outputs:
    """The torch model's outputs under the names that the graph's outputs have, as float32.

    `batched`: its forward() is one of `diffc.models.batched`.
    """
    spec = source.family
    # Only a model with quantizers needs ModelOpt, and such a model has imported it already. Importing it for any other
    # model would cost seconds and print a warning.
    has_modelopt = "modelopt" in sys.modules
    quantizers_run = cpu_block_quant if has_modelopt else nullcontext
    with torch.no_grad(), quantizers_run(), attention_by_default() if has_modelopt else nullcontext():
        kwargs = forward_kwargs(spec, source.config, values, batched=batched)
        found = model(**kwargs, return_dict=False)
        tensors = (torch.stack(found[0]),) if spec.lists and not batched else tensors_of(found)
    items = spec.outputs(source.config)
    return {item.name: out.float().numpy() for item, out in zip(items, tensors, strict=False)}


def _in_float32(drawn: Drawn) -> Drawn:
    """Inputs for a reference in float32: masks and whole numbers keep their type, which says what they mean."""
    return {k: v.float() if v.is_floating_point() else v for k, v in drawn.items()}


def reference_model(source: ModelSource, dtype: str, checkpoint: Checkpoint | None) -> torch.nn.Module:
    """The torch backbone, fake-quantized by ModelOpt: weights rounded to `dtype`, arithmetic in float32.

    Weights that a file holds as codes have the values of these, unrounded.

    In torch's own 16-bit arithmetic, its roundings, and the quantizer steps that they flip, would be part of the
    reference.
    """
    model = load_backbone(source, DTYPES[dtype])
    if checkpoint is not None:
        checkpoint.apply(model, source.family.name)
        quantize_twice_as_graphs_do(model, DTYPES[dtype])
    model = model.float()
    for name in source.exact:
        model.get_parameter(name).data = tensor_of(source.weights[name], torch.float32)
    return model


class TorchReference:
    """A torch model and the outputs that it has given so far: every case of a comparison asks for them again.

    `model` None loads the backbone of `source` and applies `checkpoint`.
    """

    def __init__(
        self,
        source: ModelSource,
        dtype: str,
        checkpoint: Checkpoint | None,
        *,
        model: torch.nn.Module | None = None,
    ):
        self.source, self.dtype, self.quantized = source, dtype, checkpoint is not None
        self.model = reference_model(source, dtype, checkpoint) if model is None else model
        self._attention: tuple[float, bool] | None = None
        self._known: dict[Any, tuple[Drawn, Outputs]] = {}

    @contextmanager
    def with_quantized_softmax(self, scale: float | None, *, rounds: bool = True) -> Iterator[None]:
        """While this is open, attention is as the pass quantize-softmax makes it; `rounds`: of its probabilities."""
        if scale is None:
            yield
            return
        self._attention = scale, rounds
        with quantized_softmax(scale if rounds else None, DTYPES[self.dtype]):
            yield
        self._attention = None

    def outputs(self, shape: Shape, seed: int, *, unrounded: bool) -> tuple[Drawn, Outputs]:
        """Random inputs at `shape`, and the outputs for them; `unrounded`: activations are not rounded."""
        key = (shape, seed, unrounded, self._attention)
        if key not in self._known:
            self._known[key] = self.forward(shape, seed, unrounded=unrounded)
        return self._known[key]

    def forward(
        self, shape: Shape, seed: int, *, unrounded: bool, watched: AbstractContextManager[Any] | None = None
    ) -> tuple[Drawn, Outputs]:
        """The same, computed anew. `watched` is open during the run; its hooks see what modules give in graphs."""
        spec = self.source.family
        drawn = random_inputs(spec, self.source.config, shape, dtype=DTYPES[self.dtype], seed=seed)
        as_graph = batched_forward(self.model) if watched is not None else nullcontext(False)
        with (
            without_rounding(self.model) if unrounded else nullcontext(),
            watched or nullcontext(),
            as_graph as batched,
        ):
            expected = torch_outputs(self.model, self.source, _in_float32(drawn), batched=batched)
        return drawn, expected

    def floor(self, shape: Shape, seed: int, rounding: float) -> float:
        """Largest relative L2 change of the output when every layer's output is off by `rounding`."""
        drawn, expected = self.outputs(shape, seed, unrounded=False)
        changes = []
        for run in range(FLOOR_RUNS):
            with noisy(self.model, rounding, run):
                other = torch_outputs(self.model, self.source, _in_float32(drawn))
            changes += [
                np.linalg.norm(other[n] - expected[n]) / np.linalg.norm(expected[n]) for n in expected
            ]
        return float(max(changes))
