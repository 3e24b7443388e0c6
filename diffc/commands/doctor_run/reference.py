"""What the outputs of a case are held against: its own graph in ONNX Runtime on the CPU, and torch's kept outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import psutil
import torch

from diffc.artifact.folder import Artifact
from diffc.commands.doctor_run.cases import Case, Sample
from diffc.validate.compare import OutputComparison, compare
from diffc.validate.comparisons import format_and_dtype
from diffc.validate.onnx_reference import GraphReference
from diffc.validate.outputs import ROUNDING
from diffc.validate.reports import GraphSizes
from diffc.validate.tolerances import tolerance_of
from passes.storage import load

_BYTES = 16
"""Memory per weight of the comparison: the float32 copy and ONNX Runtime's, each twice while loading."""
_SIZES = GraphSizes(())
"""In the place of sizes: the inputs are there already, and their number is the seed."""


@dataclass(frozen=True)
class Held:
    """The outputs of a case for one sample against one reference, "ONNX Runtime on the CPU" or "torch".

    `floor`: how far roundings alone move the reference's own outputs, measured where they are over the limit.
    """

    against: str
    rows: Sequence[OutputComparison]
    floor: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether each output is within the limit, or over it by no more than roundings explain."""
        return all(r.passed or (r.rel_l2 is not None and r.rel_l2 <= 3 * self.floor) for r in self.rows)


class References:
    """The reference of one graph. Graphs that do not fit the memory are held against torch's outputs alone."""

    def __init__(self, artifact: Artifact, graph: str, samples: Sequence[Sample]):
        self.model = load(artifact.present(graph))
        self.format, self.dtype = format_and_dtype(artifact, self.model)
        self.limit = tolerance_of(self.format, self.dtype)
        needed = _weights(self.model) * _BYTES
        free = int(psutil.virtual_memory().available)
        self.why_not = (
            f"ONNX Runtime on the CPU would need {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
            if needed > free
            else ""
        )
        drawn = [
            {name: torch.from_numpy(np.array(a, np.float32)) for name, a in s.inputs.items()} for s in samples
        ]
        self._reference = GraphReference(
            self.model, self.dtype, lambda shape, index: drawn[index], quantized=self.format != "none"
        )

    def hold(self, index: int, sample: Sample, result: dict[str, npt.NDArray[Any]]) -> Iterator[Held]:
        """The comparisons of one sample's outputs."""
        floor = 0.0
        if not self.why_not:
            _, expected = self._reference.outputs(_SIZES, index, unrounded=False)
            rows = compare(expected, result, self.limit)
            if not all(row.passed for row in rows):
                floor = self._reference.floor(_SIZES, index, ROUNDING[self.dtype])
            yield Held("ONNX Runtime on the CPU", rows, floor)
        if sample.torch is not None:
            yield Held("torch", compare(sample.torch, result, self.limit), max(floor, sample.floor))

    def close(self) -> None:
        """Free the sessions."""
        self._reference.close()


@contextmanager
def references(artifact: Artifact, case: Case, samples: Sequence[Sample]) -> Iterator[References]:
    """The reference of a case, freed at the end."""
    found = References(artifact, case.graph, samples)
    try:
        yield found
    finally:
        found.close()


def _weights(model: onnx.ModelProto) -> int:
    return sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
