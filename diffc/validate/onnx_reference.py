"""An ONNX graph as the reference that another graph is compared with: that of an artifact, or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.validate.float32 import cpu_session, feed, float32_copy, unrounded_copy
from diffc.validate.outputs import FLOOR_RUNS, Drawn, Outputs, as_float32
from diffc.validate.passes import random_array
from diffc.validate.reports import GraphSizes, Sizes

Draw = Callable[[Sizes, int], Drawn]
"""Random values for every input, at the given sizes and seed."""


class GraphReference:
    """ONNX Runtime on the float32 copy of `model`, on the CPU. Close it to free its sessions.

    `quantized`: the comparison without rounding of activations is to be made as well.
    """

    def __init__(self, model: onnx.ModelProto, dtype: str, draw: Draw, *, quantized: bool):
        self.model, self.dtype, self.quantized = model, dtype, quantized
        self._draw = draw
        self._open = ExitStack()
        self._sessions: dict[bool, tuple[onnx.ModelProto, OrtSession]] = {}
        self._known: dict[Any, tuple[Drawn, Outputs]] = {}

    def outputs(self, shape: Sizes, seed: int, *, unrounded: bool) -> tuple[Drawn, Outputs]:
        """Random inputs at `shape`, and the outputs for them; `unrounded`: activations are not rounded."""
        key = (shape, seed, unrounded)
        if key not in self._known:
            drawn = self._draw(shape, seed)
            self._known[key] = drawn, self._run(as_float32(drawn), unrounded)
        return self._known[key]

    def floor(self, shape: Sizes, seed: int, rounding: float) -> float:
        """Largest relative L2 change of an output when every floating-point input is off by up to `rounding`."""
        drawn, expected = self.outputs(shape, seed, unrounded=False)
        changes = []
        for run in range(FLOOR_RUNS):
            generator = torch.Generator().manual_seed(run)
            noisy = {name: _noisy(value, rounding, generator) for name, value in drawn.items()}
            other = self._run(noisy, unrounded=False)
            changes += [
                np.linalg.norm(other[n] - expected[n]) / np.linalg.norm(expected[n]) for n in expected
            ]
        return float(max(changes))

    @contextmanager
    def with_quantized_softmax(self, scale: float | None, *, rounds: bool = True) -> Iterator[None]:
        """Changes nothing: the graph has its quantizers itself."""
        del scale, rounds
        yield

    def copy(self, *, unrounded: bool) -> onnx.ModelProto:
        """The float32 graph that is run."""
        return unrounded_copy(self.model) if unrounded else float32_copy(self.model)

    def _run(self, arrays: Outputs, unrounded: bool) -> Outputs:
        if unrounded not in self._sessions:
            copy = self.copy(unrounded=unrounded)
            self._sessions[unrounded] = copy, self._open.enter_context(cpu_session(copy))
        copy, session = self._sessions[unrounded]
        return {name: np.asarray(a) for name, a in session.run(feed(copy, arrays)).items()}

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

    def draw(sizes: Sizes, seed: int) -> Drawn:
        known = dict(sizes.dims) if isinstance(sizes, GraphSizes) else {}
        rng = np.random.default_rng(seed)
        arrays = {v.name: random_array(v, known, rng, 2) for v in model.graph.input}
        return {
            n: torch.from_numpy(a if a.dtype.isbuiltin else a.astype(np.float32)) for n, a in arrays.items()
        }

    return draw
