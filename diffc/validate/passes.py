"""The pass runner's numeric check: the same inputs through the graph before and after each pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from diffc.validate.compare import compare
from diffc.validate.float32 import Arrays, cpu_session, feed, unrounded_copy
from diffc.validate.tolerances import PASS_REL_L2
from passes import Pass, PassCheckError
from passes.graph.check import check_structure
from passes.storage import initializers, weight_bytes
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe

NUMERIC_LIMIT = 512 << 20
"""Bytes of weights up to which every pass is checked in numbers; above it, structure only (and said so)."""

# type -> (least and largest value, half a step relative to the value, half a step near zero). E4M3 has 3 mantissa
# bits: steps of 2^-3 of the leading power of two, so at most 2^-4 of the value, and 2^-9 for subnormals.
_STEPS = {
    TensorProto.INT8: (-128.0, 127.0, 0.0, 0.5),
    TensorProto.FLOAT8E4M3FN: (-448.0, 448.0, 2.0**-4, 2.0**-10),
}


Outputs = dict[str, npt.NDArray[Any]]
"""Output name -> values."""


class NumericCheck:
    """Structure, then numbers: the outputs after a pass against those before it, for each set of inputs.

    Both graphs run as their unrounded float32 copies. A pass may change outputs by its own `tolerance` plus the
    rounding of reordered arithmetic (`tolerances.PASS_REL_L2`). Weights that a pass quantized are compared with the
    originals. Raises PassCheckError with the pass and the output or weight.
    """

    def __init__(self, inputs: Callable[[], Sequence[Arrays]]):
        self._inputs = inputs
        self._last: list[Outputs] | None = None
        self._known: dict[bytes, list[Outputs]] = {}

    def __call__(self, before: onnx.ModelProto | None, after: onnx.ModelProto, step: Pass | None) -> str:
        """One line on what was compared."""
        line = check_structure(before, after, step)
        if weight_bytes(after) > NUMERIC_LIMIT:
            return f"{line}; numbers not compared (weights over {NUMERIC_LIMIT >> 20} MiB)"
        results = self._outputs(after)
        old, self._last = self._last, results
        if before is None or old is None or step is None:
            return line
        quantized = check_quantized_weights(before, after)
        limit = step.tolerance + PASS_REL_L2
        rows = [row for a, b in zip(old, results, strict=True) for row in compare(a, b, limit)]
        for row in rows:
            if not row.passed:
                raise PassCheckError(
                    f"pass {step.name!r} changed output {row.name!r}: {row.reason}."
                    " Run with --dump to see the graphs around it"
                )
        line += f"; {quantized} quantized weights within half a step" if quantized else ""
        return f"{line}; outputs within {max(row.rel_l2 or 0.0 for row in rows):.1e} (limit {limit:.1e})"

    def _outputs(self, model: onnx.ModelProto) -> list[Outputs]:
        """What `model` gives for each set of inputs; a graph that was seen before is not run again.

        That happens in every compile: each target's pipeline starts at the graph that the canonical one ended with.
        """
        digest = hashlib.sha256(model.SerializeToString(deterministic=True)).digest()
        if digest not in self._known:
            copy = unrounded_copy(model)
            with cpu_session(copy) as session:
                self._known[digest] = [session.run(feed(copy, values)) for values in self._inputs()]
        return self._known[digest]


def check_quantized_weights(before: onnx.ModelProto, after: onnx.ModelProto) -> int:
    """Check that a pass rounded every weight to the nearest step: no value may be off by more than half a step.

    Returns how many initializers were quantized between the two models. The bound is computed from the definition of
    the types, not from the code that rounds. Raises PassCheckError with the weight.
    """
    known = {t.name for t in initializers(before)}
    count = 0
    for tensor in initializers(after):
        recipe = Recipe.of_tensor(tensor)
        if recipe is None or tensor.name in known or recipe.dtype not in _STEPS:
            continue
        position = next((i for i, op in enumerate(recipe.ops) if op.name == "quantize"), None)
        if position is not None:
            count += 1
            _check_weight(tensor.name, recipe, position)
    return count


def _check_weight(name: str, recipe: Recipe, position: int) -> None:
    args = recipe.ops[position].args
    if args["block_size"]:
        return  # blocks are checked through the model's outputs
    shape = recipe.source.shape
    for op in recipe.ops[:position]:
        shape = tuple(op.args["shape"]) if op.name == "reshape" else shape
        shape = tuple(shape[i] for i in op.args["perm"]) if op.name == "transpose" else shape

    def value_after(count: int, dtype: int) -> npt.NDArray[np.float64]:
        return evaluate(Recipe(recipe.source, recipe.ops[:count], dtype, shape)).astype(np.float64)

    original, quantized = value_after(position, recipe.source.dtype), value_after(position + 1, args["to"])
    scale = evaluate(Recipe.from_json(args["scale"])).astype(np.float64)
    if args["axis"] is not None and scale.ndim:
        scale = scale.reshape([-1 if i == args["axis"] % original.ndim else 1 for i in range(original.ndim)])
    least, largest, relative, absolute = _STEPS[args["to"]]
    wanted = np.clip(original / scale, least, largest)
    # The slack is the rounding of the scale to 16 bits, and of float32 arithmetic.
    allowed = np.maximum(np.abs(wanted) * relative, absolute) + np.abs(wanted) * 2.0**-8
    worst = float(np.max(np.abs(quantized - wanted) - allowed))
    if not worst <= 0:
        raise PassCheckError(
            f"weight {name!r} was quantized wrongly: a value is {worst:.3g} steps further off than half a step"
        )


def random_feeds(model: onnx.ModelProto, *, seed: int, count: int = 2) -> list[Arrays]:
    """Random values for every graph input; each symbolic dimension has one size per feed, at least 2."""
    rng = np.random.default_rng(seed)
    feeds: list[Arrays] = []
    for i in range(count):
        sizes: dict[str, int] = {}
        feeds.append({v.name: random_array(v, sizes, rng, 2 + 2 * i) for v in model.graph.input})
    return feeds


def random_array(value: onnx.ValueInfoProto, sizes: dict[str, int], rng: Any, size: int) -> npt.NDArray[Any]:
    """A value for a graph input: normal floats, integers 0 or 1. A named dimension has its size of `sizes`.

    Names that are not in `sizes` are added to it with `size`, so that later inputs agree.
    """
    tensor = value.type.tensor_type
    names = [
        d.dim_param or (d.dim_value if d.HasField("dim_value") else value.name) for d in tensor.shape.dim
    ]
    shape = [d if isinstance(d, int) else sizes.setdefault(d, size) for d in names]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)
