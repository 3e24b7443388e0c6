"""ONNX Runtime over torch tensors, which it reads and writes in place, on exactly the provider that was asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from diffc.backends.onnx_graph import element_types, read
from diffc.backends.onnxruntime.arrays import session_options
from diffc.backends.onnxruntime.providers import is_plugin, plugin_devices, why_not
from diffc.backends.signature import Signature
from diffc.backends.target import Target
from diffc.backends.torch_types import TORCH_TYPES
from diffc.errors import DiffcError

CONTEXT = "model_ctx.onnx"
"""File name of a model whose one EPContext node refers to an engine."""

_ONNX_TYPES = {dtype: TensorProto.DataType.Value(name) for name, dtype in TORCH_TYPES.items()}
_QUANTIZED = {TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2}
_ASYNC = "disable_synchronize_execution_providers"


@dataclass(frozen=True)
class SessionOptions:
    """A model file to open for a runtime target on a device; `options` are those of the provider, as strings.

    `context`: a folder in which the TensorRT-RTX provider's compiled model is kept; None compiles each time.
    """

    model: Path
    target: Target
    device: torch.device
    options: Mapping[str, str] = field(default_factory=dict)
    context: Path | None = None


class OrtModel:
    """A `Session` of ONNX Runtime.

    On CUDA the graph runs on a stream of its own, which waits for the caller's current stream and is waited for
    by it: any stream may call. Raises DiffcError when the model is broken or the provider does not come up.
    """

    def __init__(self, wanted: SessionOptions, signature: Signature):
        wanted.target.require()
        self._device = wanted.device
        self._types = {v.name: TORCH_TYPES[v.dtype] for v in signature.outputs}
        self._stream: torch.cuda.Stream | None = None
        if wanted.device.type == "cuda":
            self._stream = torch.cuda.Stream(wanted.device)  # type: ignore[no-untyped-call]  # torch does not type it
        self._session: Any = _open(wanted, self._stream)

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""
        return self._device

    def run(
        self, inputs: Mapping[str, Tensor], output_shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The outputs by name, in new tensors. Raises DiffcError when ONNX Runtime fails."""
        binding, outputs = self._bound(inputs, output_shapes)
        self._run(binding, [*inputs.values(), *outputs.values()])
        return outputs

    def close(self) -> None:
        """Free the session and its weights."""
        self._session = None

    def _bound(
        self, inputs: Mapping[str, Tensor], output_shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Any, dict[str, Tensor]]:
        """A binding of inputs and new outputs, and these outputs. Raises DiffcError when the session is closed."""
        if self._session is None:
            raise DiffcError("this compiled backbone is closed", fix="load it again: diffc.load(artifact)")
        outputs = {
            name: torch.empty(shape, dtype=self._types[name], device=self._device)
            for name, shape in output_shapes.items()
        }
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *_place(tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, *_place(tensor))
        return binding, outputs

    def _run(self, binding: Any, tensors: list[Tensor]) -> None:
        import onnxruntime as ort

        options = ort.RunOptions()
        stream = self._stream
        if stream is not None:
            options.add_run_config_entry(_ASYNC, "1")  # order comes from the streams, not from waiting
            stream.wait_stream(torch.cuda.current_stream(self._device))
            for tensor in tensors:
                tensor.record_stream(stream)
        self._launch(binding, options)
        if stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(stream)

    def _launch(self, binding: Any, options: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime has one unrelated exception class per status code
            raise DiffcError(
                f"ONNX Runtime failed to run the model: {error}",
                fix="check the values that go in; diffc validate ARTIFACT tells whether the model is whole",
            ) from error


def options_for(target: Target, types: Set[int]) -> Any:
    """onnxruntime.SessionOptions for a graph that holds these onnx.TensorProto types, on a runtime target."""
    import onnxruntime as ort

    options = session_options(types)
    if target.name == "ort-cuda" and not types & _QUANTIZED:
        # What its other optimizations find is fused already, and one of them makes two Slices a slow Split: at this
        # level a step of SD3.5-medium takes 0.7 ms less on an H200.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


def _open(wanted: SessionOptions, stream: torch.cuda.Stream | None) -> Any:
    import onnxruntime as ort

    reason, fix = why_not(wanted.target)
    if reason:
        raise DiffcError(f"target {wanted.target.name!r} does not run here: {reason}", fix=fix)
    options = options_for(wanted.target, element_types(read(wanted.model)))
    settings = dict(wanted.options)
    if stream is not None:
        settings |= {
            "device_id": str(wanted.device.index or 0),
            "user_compute_stream": str(stream.cuda_stream),
        }
    try:
        if is_plugin(wanted.target):
            devices = plugin_devices()
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            options.add_provider_for_devices([devices[wanted.device.index or 0]], settings)
            model = (
                wanted.model if wanted.context is None else _compiled(wanted.model, wanted.context, options)
            )
            session = ort.InferenceSession(str(model), sess_options=options)
            expected = devices[0].ep_name
        else:
            expected = wanted.target.provider
            providers = _with_helpers(expected, settings)
            session = ort.InferenceSession(str(wanted.model), sess_options=options, providers=providers)
    except Exception as error:  # ONNX Runtime has one unrelated exception class per status code
        raise DiffcError(
            f"ONNX Runtime rejects {wanted.model}: {error}", fix="compile again, or update ONNX Runtime"
        ) from error
    session.disable_fallback()
    if session.get_providers()[0] != expected:
        # ONNX Runtime warns and goes on when a provider's libraries do not load.
        raise DiffcError(
            f"{expected} did not come up: ONNX Runtime took {session.get_providers()[0]} instead",
            fix='install the CUDA libraries of this ONNX Runtime: pip install "onnxruntime-gpu[cuda,cudnn]==1.31.1"',
        )
    return session


def _compiled(model: Path, folder: Path, options: Any) -> Path:
    """`model` as the provider in `options` compiles it: a file in `folder`, which appears when it is complete."""
    import onnxruntime as ort

    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        partial.mkdir()
        try:
            compiler = ort.ModelCompiler(
                options,
                str(model),
                embed_compiled_data_into_model=False,
                flags=ort.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED,
            )
            compiler.compile_to_file(str(partial / CONTEXT))
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder / CONTEXT


def _with_helpers(provider: str, settings: Mapping[str, str]) -> list[Any]:
    """The provider with its options; after TensorRT's, CUDA's, which runs what TensorRT leaves over."""
    chosen: list[Any] = [(provider, dict(settings))]
    if provider == "TensorrtExecutionProvider":
        shared = {k: v for k, v in settings.items() if not k.startswith("trt_")}
        chosen.append(("CUDAExecutionProvider", shared))
    return chosen


def _place(tensor: Tensor) -> tuple[str, int, int, list[int], int]:
    """Device, its number, ONNX type, shape and address, as an I/O binding takes them."""
    return (
        tensor.device.type,
        tensor.device.index or 0,
        _ONNX_TYPES[tensor.dtype],
        list(tensor.shape),
        tensor.data_ptr(),
    )
