"""An ONNX graph as the reference that another is held against: of an artifact, or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.validate.float32 import cpu_session, feed, float32_twin, smooth_twin
from diffc.validate.passes import random_array
from diffc.validate.reports import GraphSizes, Sizes
from diffc.validate.torch_reference import FLOOR_RUNS

Outputs = dict[str, npt.NDArray[Any]]
Draw = Callable[[Sizes, int], dict[str, torch.Tensor]]
"""Random values for every input, at the given sizes and seed."""


class GraphReference:
    """ONNX Runtime on the float32 twin of `model`, on the CPU. Close it to free its sessions.

    `quantized`: the smooth comparison, without rounding of activations, is to be made as well.
    """

    def __init__(self, model: onnx.ModelProto, dtype: str, draw: Draw, *, quantized: bool):
        self.model, self.dtype, self.quantized = model, dtype, quantized
        self._draw = draw
        self._open = ExitStack()
        self._sessions: dict[bool, tuple[onnx.ModelProto, OrtSession]] = {}
        self._known: dict[Any, tuple[dict[str, torch.Tensor], Outputs]] = {}

    def outputs(self, shape: Any, seed: int, *, smooth: bool) -> tuple[dict[str, torch.Tensor], Outputs]:
        """Random inputs at `shape`, and the outputs for them; `smooth`: activations are not rounded."""
        key = (shape, seed, smooth)
        if key not in self._known:
            drawn = self._draw(shape, seed)
            arrays = {name: np.asarray(value.float().numpy()) for name, value in drawn.items()}
            self._known[key] = drawn, self._run(arrays, smooth)
        return self._known[key]

    def floor(self, shape: Any, seed: int, rounding: float) -> float:
        """Largest relative L2 change of an output when every floating-point input is off by up to `rounding`."""
        drawn, expected = self.outputs(shape, seed, smooth=False)
        changes = []
        for run in range(FLOOR_RUNS):
            generator = torch.Generator().manual_seed(run)
            noisy = {name: _noisy(value, rounding, generator) for name, value in drawn.items()}
            other = self._run(noisy, smooth=False)
            changes += [
                np.linalg.norm(other[n] - expected[n]) / np.linalg.norm(expected[n]) for n in expected
            ]
        return float(max(changes))

    @contextmanager
    def with_quantized_softmax(self, scale: float | None) -> Iterator[None]:
        """The graph has its quantizers itself."""
        del scale
        yield

    def twin(self, *, smooth: bool) -> onnx.ModelProto:
        """The graph that is run."""
        return smooth_twin(self.model) if smooth else float32_twin(self.model)

    def _run(self, arrays: Outputs, smooth: bool) -> Outputs:
        if smooth not in self._sessions:
            twin = self.twin(smooth=smooth)
            self._sessions[smooth] = twin, self._open.enter_context(cpu_session(twin))
        twin, session = self._sessions[smooth]
        return {name: np.asarray(a) for name, a in session.run(feed(twin, arrays)).items()}

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()
        self._open.close()


def _noisy(value: torch.Tensor, rounding: float, generator: torch.Generator) -> npt.NDArray[Any]:
    out = value.float()
    if value.is_floating_point():
        out = out * (1 + rounding * (torch.rand(out.shape, generator=generator) * 2 - 1))
    return np.asarray(out.numpy())


def draw_by_graph(model: onnx.ModelProto) -> Draw:
    """Random inputs for a graph of which nothing else is known: normal floats, integers and booleans 0 or 1."""

    def draw(sizes: Sizes, seed: int) -> dict[str, torch.Tensor]:
        known = dict(sizes.dims) if isinstance(sizes, GraphSizes) else {}
        rng = np.random.default_rng(seed)
        arrays = {v.name: random_array(v, known, rng, 2) for v in model.graph.input}
        return {n: torch.from_numpy(_numpy_type(a)) for n, a in arrays.items()}

    return draw


def _numpy_type(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array if array.dtype.isbuiltin else array.astype(np.float32)
