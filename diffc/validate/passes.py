"""The pass runner's numeric check: the same inputs through the graph before and after each pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from diffc.validate.compare import compare
from diffc.validate.float32 import Arrays, cpu_session, feed, smooth_twin
from diffc.validate.folded import check_folded_weights
from diffc.validate.tolerances import PASS_REL_L2
from passes import Pass, PassCheckError
from passes.graph.check import check_structure
from passes.storage import weight_bytes

NUMERIC_LIMIT = 512 << 20
"""Bytes of weights up to which every pass is checked in numbers; above it, structure only (and said so)."""


class NumericCheck:
    """Structure, then numbers: outputs after a pass against those before it, at every given set of inputs.

    Both graphs run as their smooth float32 twins. A pass may change outputs by its own `tolerance`, and by
    the rounding of reordered arithmetic (`tolerances.PASS_REL_L2`). Weights that a pass quantized are held against
    the originals as well. Raises PassCheckError naming the pass and the output or weight.
    """

    def __init__(self, inputs: Callable[[], Sequence[Arrays]]):
        self._inputs = inputs
        self._last: list[dict[str, npt.NDArray[Any]]] | None = None

    def __call__(self, before: onnx.ModelProto | None, after: onnx.ModelProto, step: Pass | None) -> str:
        """One line on what was compared."""
        line = check_structure(before, after, step)
        if weight_bytes(after) > NUMERIC_LIMIT:
            return f"{line}; numbers not compared (weights over {NUMERIC_LIMIT >> 20} MiB)"
        twin = smooth_twin(after)
        with cpu_session(twin) as session:
            results = [session.run(feed(twin, values)) for values in self._inputs()]
        old, self._last = self._last, results
        if before is None or old is None or step is None:
            return line
        folded = check_folded_weights(before, after)
        limit = step.tolerance + PASS_REL_L2
        rows = [row for a, b in zip(old, results, strict=True) for row in compare(a, b, limit)]
        for row in rows:
            if not row.passed:
                raise PassCheckError(
                    f"pass {step.name!r} changed output {row.name!r}: {row.reason}."
                    " Run with --dump to see the graphs around it"
                )
        line += f"; {folded} quantized weights within half a step" if folded else ""
        return f"{line}; outputs within {max(row.rel_l2 or 0.0 for row in rows):.1e} (limit {limit:.1e})"


def random_feeds(model: onnx.ModelProto, *, seed: int, count: int = 2) -> list[Arrays]:
    """Random values for every graph input; each symbolic dimension has one size per feed, at least 2."""
    rng = np.random.default_rng(seed)
    feeds: list[Arrays] = []
    for i in range(count):
        sizes: dict[str, int] = {}
        feeds.append({v.name: random_array(v, sizes, rng, 2 + 2 * i) for v in model.graph.input})
    return feeds


def random_array(value: onnx.ValueInfoProto, sizes: dict[str, int], rng: Any, size: int) -> npt.NDArray[Any]:
    """A value for a graph input: normal floats, integers 0 or 1; dimensions by name from `sizes`, else `size`."""
    tensor = value.type.tensor_type
    names = [
        d.dim_param or (d.dim_value if d.HasField("dim_value") else value.name) for d in tensor.shape.dim
    ]
    shape = [d if isinstance(d, int) else sizes.setdefault(d, size) for d in names]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)
