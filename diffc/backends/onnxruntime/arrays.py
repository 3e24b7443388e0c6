"""An ONNX Runtime session over numpy arrays: errors name the wrong input, and no other provider is ever taken."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from diffc.backends.onnx_graph import GraphInput, element_types, graph_inputs, read
from diffc.backends.target import TARGETS
from diffc.errors import DiffcError, unknown

Array = npt.NDArray[Any]

_FLOAT8 = {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2}
# Types that numpy itself lacks: ONNX Runtime takes them by their ONNX number, and ml_dtypes names them.
_NOT_NUMPY = {TensorProto.BFLOAT16, *_FLOAT8}


class OrtSession:
    """A model that ONNX Runtime runs: a file, with its weights beside it, or the bytes of one.

    With `exact`, ONNX Runtime computes what the graph says: no kernel that quantizes further (it runs INT8
    weights after DequantizeLinear through MatMulNBits, which was measured 8e-5 off). Raises DiffcError when
    the file is broken, the provider is not there, or ONNX Runtime rejects the model.
    """

    def __init__(
        self,
        model: Path | bytes,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        *,
        exact: bool = False,
    ):
        TARGETS["ort"].require()
        proto = onnx.load_from_string(model) if isinstance(model, bytes) else read(model)
        self._inputs = {i.name: i for i in graph_inputs(proto)}
        self._outputs = [o.name for o in proto.graph.output]
        source = model if isinstance(model, bytes) else str(model)
        self._session: Any = _open(source, list(providers), element_types(proto), exact)

    @property
    def inputs(self) -> tuple[GraphInput, ...]:
        """The inputs that `run` must be fed, in graph order."""
        return tuple(self._inputs.values())

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, in their own types (ml_dtypes ones for bfloat16 and float8).

        Raises DiffcError when a name, type, rank or fixed dimension of `feed` does not fit, or the run fails.
        """
        if self._session is None:
            raise DiffcError("this ONNX Runtime session is closed", fix="run it inside its `with` block")
        self._check_names(feed)
        for name, array in feed.items():
            _check_array(self._inputs[name], array)
        values = {name: _to_ort(self._inputs[name], array) for name, array in feed.items()}
        try:
            results = self._session.run_with_ort_values(self._outputs, values)
        except Exception as error:  # ONNX Runtime has one unrelated exception class per status code
            raise DiffcError(
                f"ONNX Runtime failed to run the model: {error}",
                fix="check the values that go in; diffc validate ARTIFACT tells whether the model is whole",
            ) from error
        return {name: _to_numpy(value) for name, value in zip(self._outputs, results, strict=True)}

    def close(self) -> None:
        """Free the session and its weights."""
        self._session = None

    def __enter__(self) -> OrtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_names(self, feed: Mapping[str, Array]) -> None:
        for name in feed:
            if name not in self._inputs:
                raise unknown("input", name, self._inputs)
        missing = [name for name in self._inputs if name not in feed]
        if missing:
            raise DiffcError(
                f"no value for input {', '.join(missing)}. Inputs: {', '.join(self._inputs)}",
                fix="give a value for each input",
            )


def _open(source: str | bytes, providers: list[str], types: set[int], exact: bool) -> Any:
    import onnxruntime as ort

    for provider in providers:
        if provider not in ort.get_available_providers():
            raise unknown("ONNX Runtime provider", provider, ort.get_available_providers())
    options = session_options(types, exact=exact)
    try:
        session = ort.InferenceSession(source, sess_options=options, providers=providers)
    except Exception as error:  # ONNX Runtime has one unrelated exception class per status code
        raise DiffcError(
            f"ONNX Runtime rejects the model: {error}", fix="compile again, or update ONNX Runtime"
        ) from error
    session.disable_fallback()
    if session.get_providers()[0] != providers[0]:
        raise DiffcError(
            f"ONNX Runtime took {session.get_providers()[0]} instead of {providers[0]}",
            fix="install what that provider needs: diffc doctor",
        )
    return session


def session_options(types: Collection[int], *, exact: bool = False) -> Any:
    """onnxruntime.SessionOptions for a graph that holds these onnx.TensorProto types; `exact` as in `OrtSession`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal ones: errors come as exceptions, which we show
    if exact:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if exact or _FLOAT8.intersection(types):
        # The optimizer's QDQ rewrites turn a float8 MatMul into MatMulIntegerToFloat, which exists for 8-bit
        # integers only (INVALID_GRAPH). Everything else it does stays on; integer graphs keep their kernels.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def array_type(name: str) -> np.dtype[Any]:
    """The numpy type (of ml_dtypes where numpy has none) of an element type of ONNX, by its name."""
    return _np_dtype(TensorProto.DataType.Value(name))


def _np_dtype(element_type: int) -> np.dtype[Any]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element_type))


def _check_array(graph_input: GraphInput, array: Array) -> None:
    expected = _np_dtype(graph_input.dtype)
    if array.dtype != expected:
        raise DiffcError(
            f"input {graph_input.name}: {array.dtype} was given, {expected} is needed",
            fix="convert the array",
        )
    fits = len(array.shape) == len(graph_input.dims) and all(
        fixed in (None, size) for fixed, size in zip(graph_input.dims, array.shape, strict=True)
    )
    if not fits:
        needed = ["any" if d is None else d for d in graph_input.dims]
        raise DiffcError(
            f"input {graph_input.name}: shape {list(array.shape)} was given, {needed} is needed",
            fix="convert the array",
        )


def _to_ort(graph_input: GraphInput, array: Array) -> Any:
    from onnxruntime import OrtValue

    array = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray alone makes a scalar 1-d
    if graph_input.dtype in _NOT_NUMPY:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array, graph_input.dtype)
    return OrtValue.ortvalue_from_numpy(array)


def _to_numpy(value: Any) -> Array:
    element_type = value.element_type()
    if element_type not in _NOT_NUMPY:
        return np.asarray(value.numpy())
    dtype, shape = _np_dtype(element_type), tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    # OrtValue.numpy() knows no bfloat16 and calls float8 uint8, so the bytes are read where they lie.
    data = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(value.data_ptr())
    return np.frombuffer(bytearray(data), dtype).reshape(shape)
