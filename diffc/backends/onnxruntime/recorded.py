"""ONNX Runtime's CUDA provider with recorded launches: a CUDA graph for each shape, in memory of its own."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffc.backends.onnxruntime.run import OrtModel, SessionOptions
from diffc.backends.signature import Signature

_GRAPH = "gpu_graph_id"
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Recorded:
    """The recorded launches of one shape: their inputs, outputs and binding, and ONNX Runtime's number for them."""

    number: int
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    binding: Any


class RecordedOrt(OrtModel):
    """A `Session` of ONNX Runtime's CUDA provider that records the launches of each shape once and replays them.

    The first run of a shape runs and records; its memory stays until `close`. Inputs are copied to where the graph
    reads them, outputs from where it writes. One run at a time: threads take turns.
    """

    def __init__(self, wanted: SessionOptions, signature: Signature):
        super().__init__(replace(wanted, options={**wanted.options, "enable_cuda_graph": "1"}), signature)
        self._lock = threading.Lock()
        self._recorded: dict[Shapes, Recorded] = {}

    def run(
        self, inputs: Mapping[str, Tensor], output_shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The outputs by name, in new tensors. Raises DiffcError when ONNX Runtime fails."""
        import onnxruntime as ort

        stream = self._stream
        assert stream is not None  # the target is one of CUDA
        caller = torch.cuda.current_stream(self._device)
        with self._lock:
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                graph = self._of(inputs, output_shapes)
                for name, tensor in inputs.items():
                    graph.inputs[name].copy_(tensor)
                    tensor.record_stream(stream)
                options = ort.RunOptions()
                options.add_run_config_entry(_GRAPH, str(graph.number))
                self._launch(graph.binding, options)
                outputs = {name: tensor.clone() for name, tensor in graph.outputs.items()}
        for tensor in outputs.values():
            tensor.record_stream(caller)
        caller.wait_stream(stream)
        return outputs

    def close(self) -> None:
        """Free the session, its graphs and their memory."""
        with self._lock:
            torch.cuda.synchronize(self._device)
            super().close()
            self._recorded.clear()

    def _of(self, inputs: Mapping[str, Tensor], output_shapes: Mapping[str, tuple[int, ...]]) -> Recorded:
        key: Shapes = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in inputs.items()))
        if key not in self._recorded:
            mine = {
                name: torch.empty_like(t, memory_format=torch.contiguous_format) for name, t in inputs.items()
            }
            binding, outputs = self._bound(mine, output_shapes)
            self._recorded[key] = Recorded(len(self._recorded) + 1, mine, outputs, binding)
        return self._recorded[key]
