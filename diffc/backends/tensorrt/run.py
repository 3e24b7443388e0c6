"""Runs TensorRT and TensorRT-RTX engines over torch tensors, in place, on the caller's stream.

An engine's scratch memory is allocated once, for its largest profile, and one run at a time uses it: threads take
turns on the processor, and runs of different streams are put in order on the GPU by an event.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffc.backends.profile import Profile
from diffc.backends.signature import Signature, pick_profile
from diffc.backends.target import Target
from diffc.backends.torch_types import TORCH_TYPES
from diffc.errors import DiffcError
from passes.base import PassError
from passes.files.atomic import write_bytes


@dataclass(frozen=True)
class EngineFile:
    """An engine of target trt-rtx or tensorrt to open on a CUDA device.

    `cache` is the file of TensorRT-RTX's compiled kernels, read at the start and written by `close`; None keeps
    none. `cuda_graph`: TensorRT-RTX records each shape's launches and replays them. `weights` is the ONNX model
    from which an engine built without its weights is filled.
    """

    path: Path
    target: Target
    device: torch.device
    profiles: tuple[Profile, ...]
    cache: Path | None = None
    cuda_graph: bool = False
    weights: Path | None = None


class Engine:
    """A `Session` of TensorRT or TensorRT-RTX. Raises DiffcError when the engine does not load on this GPU."""

    def __init__(self, file: EngineFile, signature: Signature):
        self._file = file
        self._types = {v.name: TORCH_TYPES[v.dtype] for v in signature.outputs}
        self._lock = threading.Lock()
        trt = _module(file.target)
        with torch.cuda.device(file.device):
            self._runtime, self._engine = deserialize(trt, file.path)
            if file.weights is not None:
                refit(trt, self._runtime[0], self._engine, file.weights)
            self._cache, self._context = _context(trt, self._engine, file)
            size = int(self._engine.device_memory_size_v2)
            self._memory = torch.empty(max(size, 1), dtype=torch.uint8, device=file.device)
            self._context.set_device_memory(self._memory.data_ptr(), size)
            self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch does not type it

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""
        return self._file.device

    def run(
        self, inputs: Mapping[str, Tensor], output_shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The outputs by name, in new tensors, queued on the current stream. Raises DiffcError on failure."""
        device = self._file.device
        with self._lock, torch.cuda.device(device):
            if self._context is None:
                raise DiffcError(
                    "this compiled backbone is closed", fix="load it again: diffc.load(artifact)"
                )
            stream = torch.cuda.current_stream(device)
            outputs = {
                name: torch.empty(shape, dtype=self._types[name], device=device)
                for name, shape in output_shapes.items()
            }
            stream.wait_event(self._last)  # the scratch memory may still serve a run of another stream
            self._bind(inputs, outputs, stream)
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise DiffcError(
                    f"TensorRT failed to run {self._file.path.name}; its log is on stderr",
                    fix="look at that log; diffc doctor --run ARTIFACT tells more",
                )
            self._last.record(stream)
            self._memory.record_stream(stream)
        return outputs

    def close(self) -> None:
        """Keep the compiled kernels, then free the engine and its memory."""
        with self._lock:
            if self._context is None:
                return
            if self._cache is not None and self._file.cache is not None:
                _keep(self._file.cache, bytes(self._cache.serialize()))
            torch.cuda.synchronize(self._file.device)
            # In this order: each belongs to the one after it.
            self._context = None
            self._cache = self._engine = self._runtime = None
            self._memory = torch.empty(0, dtype=torch.uint8)

    def _bind(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], stream: torch.cuda.Stream
    ) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        profile = pick_profile(self._file.profiles, shapes) if self._file.profiles else 0
        if self._context.active_optimization_profile != profile:
            self._context.set_optimization_profile_async(profile, stream.cuda_stream)
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise DiffcError(
                    f"{self._file.path.name} takes no {name} of shape {list(shape)}",
                    fix="give a shape of the engine's profile",
                )
        for name, tensor in (*inputs.items(), *outputs.items()):
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise DiffcError(
                    f"{self._file.path.name} has no input or output {name!r}", fix="compile again"
                )


def why_not(target: Target) -> tuple[str, str]:
    """Why the target cannot be used here and what fixes it; empty when it can."""
    try:
        target.require()
    except DiffcError as error:
        return error.what, error.fix
    if not torch.cuda.is_available():
        return "torch sees no CUDA device", "install the NVIDIA driver and a CUDA build of torch"
    return "", ""


def pick_engine(engines: Sequence[Mapping[str, Any]], target: str, sm: int) -> Mapping[str, Any]:
    """The entry of the manifest's engines that a GPU of compute capability `sm` runs.

    An engine without compute capabilities was built by TensorRT for the GPU of the compile. Raises DiffcError that
    tells what there is.
    """
    mine = [e for e in engines if e["target"] == target]
    for engine in mine:
        if sm in engine["sms"] or not engine["sms"]:
            return engine
    there = ", ".join(f"SM{s}" for e in mine for s in e["sms"]) or "none"
    raise DiffcError(
        f"this GPU is SM{sm}, and the artifact's {target} engines are for: {there}",
        fix=f"compile with --target {target} --sm {sm}, if `diffc formats` lists that GPU",
    )


def deserialize(trt: Any, file: Path) -> tuple[Any, Any]:
    """The runtime and the engine of `file`, whose versions must be those of the library.

    `trt` is the module tensorrt_rtx or tensorrt. Raises DiffcError with what the library says.
    """
    said: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]  # a native class
        """Keeps errors for the message."""

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                said.append(text.strip())

    logger = Logger()
    try:
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(file.read_bytes())
    except TypeError:  # the binding's word for a runtime that could not be made
        runtime = engine = None
    if engine is None:
        told = said[-1] if said else "no reason given"
        raise DiffcError(
            f"{trt.__name__} {trt.__version__} does not load {file}: {told}",
            fix="engines run under the version that built them, on their compute capability, with the NVIDIA driver:"
            " compare manifest.json, then compile again or install that version",
        )
    return (logger, runtime), engine


def refit(trt: Any, logger: Any, engine: Any, model: Path) -> None:
    """Fill `engine`, built with --strip-weights, with the weights of the ONNX model that it was built from.

    Raises DiffcError when the model lacks some, or has other ones.
    """
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if parser.refit_from_file(str(model)) and refitter.refit_cuda_engine():
        return
    said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    missing = refitter.get_missing_weights()
    raise DiffcError(
        f"{model} does not fill the engine: {'; '.join(said) or f'{len(missing)} weights are missing'}",
        fix="keep model.onnx and model.onnx_data as they were when the engine was built, or compile again",
    )


def _module(target: Target) -> Any:
    reason, fix = why_not(target)
    if reason:
        raise DiffcError(f"target {target.name!r} does not run here: {reason}", fix=fix)
    return importlib.import_module(target.module)


def _context(trt: Any, engine: Any, file: EngineFile) -> tuple[Any, Any]:
    """The runtime cache (None without one) and an execution context that runs in memory of ours."""
    ours = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if file.target.name != "trt-rtx":
        return None, engine.create_execution_context(ours)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(ours)
    if file.cuda_graph:
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    cache = None
    if file.cache is not None:
        cache = config.create_runtime_cache()
        if file.cache.is_file():
            cache.deserialize(file.cache.read_bytes())
        config.set_runtime_cache(cache)
    return cache, engine.create_execution_context(config)


def _keep(file: Path, content: bytes) -> None:
    """Write a cache whole, since other processes read it; where it cannot be written, there is none."""
    with suppress(OSError, PassError):
        write_bytes(file, content)
