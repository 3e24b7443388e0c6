"""The pass runner's numeric check: the same inputs through the graph before and after each pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from diffc.backends.graph import element_types
from diffc.validate.compare import compare
from diffc.validate.twin import Arrays, cpu_session, feed
from passes import Pass, PassCheckError
from passes.check import check_structure
from passes.storage import weight_bytes

NUMERIC_LIMIT = 512 << 20
"""Bytes of weights up to which every pass is checked in numbers; above it, structure only (and said so)."""


PASS_NOISE = {"float32": 1e-4, "float16": 5e-3}
"""Relative L2 error that reordered arithmetic alone may cause, in the types that ONNX Runtime computes in."""


class NumericCheck:
    """Structure, then numbers: outputs after a pass against those before it, at every given set of inputs.

    A pass may change outputs by its own `tolerance`, and by the rounding of reordered arithmetic
    (`tolerances.PASS_NOISE` of the model's type). Raises PassCheckError naming the pass and the output.
    """

    def __init__(self, inputs: Callable[[], list[Arrays]]):
        self._inputs = inputs
        self._last: list[Arrays] | None = None

    def __call__(self, before: onnx.ModelProto | None, after: onnx.ModelProto, step: Pass | None) -> str:
        """One line on what was compared."""
        line = check_structure(before, after, step)
        if weight_bytes(after) > NUMERIC_LIMIT:
            return f"{line}; numbers not compared (weights over {NUMERIC_LIMIT >> 20} MiB)"
        inputs = self._inputs()
        results = [self._run(after, values) for values in inputs]
        old, self._last = self._last, results
        if old is None or step is None:
            return line
        limit = step.tolerance + PASS_NOISE["float16" if _has_float16(after) else "float32"]
        rows = [row for a, b in zip(old, results, strict=True) for row in compare(a, b, limit)]
        bad = [row for row in rows if not row.passed]
        if bad:
            raise PassCheckError(
                f"pass {step.name!r} changed output {bad[0].name!r}: relative L2 error {bad[0].rel_l2:.2e},"
                f" at most {limit:.1e} is allowed. Run with --dump to see the graphs around it"
            )
        return f"{line}; outputs within {max(row.rel_l2 for row in rows):.1e} (limit {limit:.1e})"

    @staticmethod
    def _run(model: onnx.ModelProto, values: Arrays) -> Arrays:
        with cpu_session(model) as session:
            return session.run(feed(model, values))


def _has_float16(model: onnx.ModelProto) -> bool:
    return onnx.TensorProto.FLOAT16 in element_types(model)


def random_feeds(model: onnx.ModelProto, *, seed: int, count: int = 2) -> list[Arrays]:
    """Random values for every graph input; each symbolic dimension has one size per feed, at least 2."""
    rng = np.random.default_rng(seed)
    feeds: list[Arrays] = []
    for i in range(count):
        sizes: dict[str, int] = {}
        feeds.append({v.name: _random(v, sizes, rng, 2 + 2 * i) for v in model.graph.input})
    return feeds


def _random(value: onnx.ValueInfoProto, sizes: dict[str, int], rng: Any, size: int) -> npt.NDArray[Any]:
    tensor = value.type.tensor_type
    names = [d.dim_param or (d.dim_value if d.HasField("dim_value") else value.name) for d in tensor.shape.dim]
    shape = [d if isinstance(d, int) else sizes.setdefault(d, size) for d in names]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)
