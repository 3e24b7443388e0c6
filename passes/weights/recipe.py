"""Weights as recipes: an initializer is a source and a list of operations, computed when it is written.

A recipe lives inside an ordinary `TensorProto`: `data_location=EXTERNAL` and an external-data entry
`recipe` with the recipe as JSON. So a model whose weights are gigabytes is a protobuf of a few megabytes
that survives onnx and onnx-graphsurgeon, can be dumped, diffed and sent to another process. Nothing is read
before `passes.storage` streams the result to disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.importers.onnx_importer import get_onnx_tensor_dtype
from onnx_graphsurgeon.ir.tensor import LazyValues

from passes.base import PassError

# graphsurgeon warns at every type that numpy lacks, and that it has no colours: nothing a user can act on.
gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR

LOCATION, RECIPE = (
    "diffc-recipe",
    "recipe",
)  # in memory only: `passes.graph.onnx_reader` refuses them in files
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Source:
    """Where bytes come from: a tensor `key` of a file, or `length` raw bytes at `offset`.

    `kind` names a reader in `passes.weights.sources`: "raw" (safetensors, external data and files of torch.save are
    found by `safetensors_source`, `passes.storage`, `passes.weights.torch_files`), "inline" or "memory". `path` is
    absolute. `dtype` is an onnx.TensorProto element type. For "inline", `key` holds the bytes in hex
    (scales and other small tensors only).
    """

    kind: str
    path: str
    dtype: int
    shape: tuple[int, ...]
    key: str = ""
    offset: int = 0
    length: int = 0


@dataclass(frozen=True)
class Op:
    """One operation of a recipe: the name of a kernel in `passes.weights.evaluate` and its arguments (JSON values)."""

    name: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A tensor that is not computed yet: `ops` applied in order to `source`.

    `dtype` (onnx.TensorProto element type) and `shape` are those of the result.
    """

    source: Source
    ops: tuple[Op, ...]
    dtype: int
    shape: tuple[int, ...]

    @classmethod
    def of_source(cls, source: Source) -> Recipe:
        """The recipe that reads `source` as it is."""
        return cls(source, (), source.dtype, source.shape)

    @classmethod
    def of_array(cls, array: Array) -> Recipe:
        """A small array, its bytes kept in the recipe itself."""
        dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return cls.of_source(Source("inline", "", int(dtype), array.shape, key=array.tobytes().hex()))

    @property
    def nbytes(self) -> int:
        """Bytes of the result as ONNX stores it (two 4-bit values to a byte)."""
        return (math.prod(self.shape) * bits_of(self.dtype) + 7) // 8

    @property
    def sources(self) -> Iterator[Source]:
        """Every source that the result is computed from: its own, then those of recipes among its arguments."""
        yield self.source
        for value in (value for op in self.ops for value in op.args.values()):
            for item in value if isinstance(value, list) else (value,):
                if isinstance(item, Mapping):
                    yield from Recipe.from_json(item).sources

    def _then(self, name: str, args: dict[str, Any], dtype: int, shape: tuple[int, ...]) -> Recipe:
        return replace(self, ops=(*self.ops, Op(name, args)), dtype=int(dtype), shape=shape)

    def cast(self, to: int) -> Recipe:
        """Convert to element type `to`, rounding to nearest even. A no-op when it is that type already."""
        return self if to == self.dtype else self._then("cast", {"to": int(to)}, to, self.shape)

    def transpose(self, perm: tuple[int, ...]) -> Recipe:
        """Permute axes; two transposes in a row become one."""
        shape = tuple(self.shape[i] for i in perm)
        if perm == tuple(range(len(perm))):
            return self
        return self._then("transpose", {"perm": list(perm)}, self.dtype, shape)

    def reshape(self, shape: tuple[int, ...]) -> Recipe:
        """Give the same elements another shape. Raises PassError when the sizes differ."""
        if math.prod(shape) != math.prod(self.shape):
            raise PassError(f"cannot reshape a weight of shape {self.shape} to {shape}")
        return self._then("reshape", {"shape": list(shape)}, self.dtype, shape)

    def multiply(self, by: Recipe) -> Recipe:
        """Multiply by `by` (broadcast) in float32, result in this dtype."""
        return self._then("multiply", {"by": by.to_json()}, self.dtype, self.shape)

    def subtract_product(self, left: Recipe, right: Recipe) -> Recipe:
        """Less the matrix product `left` [N, r] times `right` [r, K], made in float64; result in this dtype."""
        args = {"left": left.to_json(), "right": right.to_json()}
        return self._then("subtract_product", args, self.dtype, self.shape)

    def append(self, others: Sequence[Recipe]) -> Recipe:
        """The rows of this, then those of `others`, which have its type and its rows' shape; else PassError."""
        rows = [(o.dtype, o.shape[1:]) for o in (self, *others)]
        if not self.shape or set(rows) != {rows[0]} or bits_of(self.dtype) < 8:
            raise PassError(f"weights of shapes {[o.shape for o in (self, *others)]} have no rows in common")
        shape = (self.shape[0] + sum(o.shape[0] for o in others), *self.shape[1:])
        return self._then("append", {"others": [o.to_json() for o in others]}, self.dtype, shape)

    @property
    def rows(self) -> tuple[Recipe, ...]:
        """What `append` joined, if that came last, else itself: their bytes, one after another, are the result's."""
        if not self.ops or self.ops[-1].name != "append":
            return (self,)
        others = tuple(Recipe.from_json(data) for data in self.ops[-1].args["others"])
        count = self.shape[0] - sum(other.shape[0] for other in others)
        return replace(self, ops=self.ops[:-1], shape=(count, *self.shape[1:])), *others

    def nvfp4_scales(self, scale: Recipe, block_size: int = 16, *, four_six: bool = False) -> Recipe:
        """NVFP4: the E4M3 scale of every block of the last axis; `scale` is the tensor's, amax / (6 * 448).

        With `four_six` the largest of a block becomes 6 or 4, whichever is nearer; `scale` is then amax / (6 * 256).
        """
        args = {"scale": scale.to_json(), "block_size": block_size} | ({"four_six": True} if four_six else {})
        return self._then("nvfp4_scales", args, TensorProto.FLOAT8E4M3FN, _blocks(self.shape, block_size))

    def nvfp4_values(self, scale: Recipe, block_size: int = 16, *, four_six: bool = False) -> Recipe:
        """NVFP4: the E2M1 values that belong to `nvfp4_scales`."""
        args = {"scale": scale.to_json(), "block_size": block_size} | ({"four_six": True} if four_six else {})
        return self._then("nvfp4_values", args, TensorProto.FLOAT4E2M1, self.shape)

    def mxfp8_scales(self, block_size: int = 32) -> Recipe:
        """MXFP8: the power of two of every block of the last axis, as UINT8 (exponent + 127)."""
        args = {"block_size": block_size}
        return self._then("mxfp8_scales", args, TensorProto.UINT8, _blocks(self.shape, block_size))

    def mxfp8_values(self, block_size: int = 32) -> Recipe:
        """MXFP8: the E4M3 values that belong to `mxfp8_scales`."""
        args = {"block_size": block_size}
        return self._then("mxfp8_values", args, TensorProto.FLOAT8E4M3FN, self.shape)

    def dequantize(self, scale: Recipe, axis: int | None = None, block_size: int = 0) -> Recipe:
        """ONNX DequantizeLinear with a zero zero point, in float32, to the type of `scale`."""
        args = {"scale": scale.to_json(), "axis": axis, "block_size": block_size, "to": scale.dtype}
        return self._then("dequantize", args, scale.dtype, self.shape)

    def amax(self) -> Recipe:
        """The largest magnitude of the whole tensor, a float32 scalar."""
        return self._then("amax", {}, TensorProto.FLOAT, ())

    def spread_blocks(self, times: int, length: int) -> Recipe:
        """Each element of the last axis `times` times, the first `length` of them: scales of smaller blocks."""
        args = {"times": times, "length": length}
        return self._then("spread_blocks", args, self.dtype, (*self.shape[:-1], length))

    def scale_of_amax(self, bound: float) -> Recipe:
        """A quantizer's scale, amax / bound, in float32; `bound` is the type's largest magnitude (127, 448)."""
        return self._then("scale_of_amax", {"bound": bound}, TensorProto.FLOAT, self.shape)

    def quantize(self, scale: Recipe, to: int, axis: int | None = None, block_size: int = 0) -> Recipe:
        """ONNX QuantizeLinear with a zero zero point: saturate(round(x / scale)).

        `to` is INT8, FLOAT8E4M3FN, INT4 or FLOAT4E2M1. `scale` is a scalar (axis None), of shape
        [shape[axis]] (per channel), or, with `block_size`, of this shape with `axis` divided by it. A scale
        that comes from `scale_of_amax` is applied as ModelOpt does, x * (bound / amax), so that values half
        way between two steps, which 16-bit weights often are, fall to the same side as there.
        """
        args = {"to": int(to), "scale": scale.to_json(), "axis": axis, "block_size": block_size}
        return self._then("quantize", args, to, self.shape)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` restores an equal recipe."""
        source = {k: v for k, v in vars(self.source).items() if v not in ("", 0) or k == "dtype"}
        return {
            "source": source | {"shape": list(self.source.shape)},
            "ops": [[op.name, dict(op.args)] for op in self.ops],
            "dtype": self.dtype,
            "shape": list(self.shape),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_json`."""
        fields = {"path": "", **data["source"]}
        source = Source(**{**fields, "shape": tuple(fields["shape"])})
        ops = tuple(Op(name, args) for name, args in data["ops"])
        return cls(source, ops, data["dtype"], tuple(data["shape"]))

    def to_tensor(self, name: str) -> TensorProto:
        """The recipe as an initializer called `name`."""
        tensor = TensorProto(name=name, data_type=self.dtype, dims=self.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", LOCATION), (RECIPE, json.dumps(self.to_json(), sort_keys=True))):
            tensor.external_data.add(key=key, value=value)
        return tensor

    @classmethod
    def of_tensor(cls, tensor: TensorProto) -> Recipe | None:
        """The recipe in an initializer, or None when it holds its values itself."""
        entries = {e.key: e.value for e in tensor.external_data}
        return cls.from_json(json.loads(entries[RECIPE])) if RECIPE in entries else None


def _blocks(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """The shape of block scales along the last axis. Raises PassError when the axis does not divide into blocks."""
    if not shape or shape[-1] % block_size:
        raise PassError(f"a weight of shape {shape} has no whole blocks of {block_size} along its last axis")
    return (*shape[:-1], shape[-1] // block_size)


class RecipeValues(LazyValues):  # type: ignore[misc]  # graphsurgeon has no type information
    """The values of a `gs.Constant` that are a recipe. Loading evaluates it (small tensors, tests only)."""

    evaluate: Callable[[Recipe], Array] | None = (
        None  # set by passes.weights.evaluate, so that this file stays data
    )

    def __init__(self, tensor: TensorProto):
        recipe = Recipe.of_tensor(tensor)
        if recipe is None:
            raise PassError(f"initializer {tensor.name!r} has no recipe")
        self.tensor, self.recipe = tensor, recipe
        self.shape, self.dtype = list(recipe.shape), get_onnx_tensor_dtype(tensor)
        self.nbytes = recipe.nbytes

    def load(self) -> Array:
        """The array of the result, computed now."""
        if RecipeValues.evaluate is None:
            raise PassError("import passes.weights.evaluate to evaluate recipes")
        return RecipeValues.evaluate(self.recipe)


def recipe_of(tensor: gs.Tensor) -> Recipe | None:
    """The recipe of a constant, or None for a variable or a constant whose values are in memory."""
    values = getattr(tensor, "_values", None)
    return values.recipe if isinstance(values, RecipeValues) else None


def constant(name: str, recipe: Recipe) -> gs.Constant:
    """A graphsurgeon constant called `name` whose values are `recipe`."""
    return gs.Constant(name, RecipeValues(recipe.to_tensor(name)))


def default_opset(imports: Iterable[onnx.OperatorSetIdProto]) -> int | None:
    """The version of the default domain among opset imports; None when it is not imported."""
    return next((int(item.version) for item in imports if item.domain in ("", "ai.onnx")), None)


def dtype_of(tensor: gs.Tensor) -> int | None:
    """The onnx.TensorProto element type of any tensor (graphsurgeon mixes numpy types and ONNX ints)."""
    dtype = tensor.dtype
    if dtype is None or isinstance(dtype, int):
        return dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def bits_of(dtype: int) -> int:
    """Bits of one element of an onnx.TensorProto element type, as ONNX stores it."""
    if dtype in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1):
        return 4
    return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype)).itemsize) * 8
