"""The interface of everything that runs a compiled model, and of what opens it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffc.backends.signature import Signature
from diffc.backends.target import Target


class Session(Protocol):
    """A graph that is loaded and ready.

    `run` takes contiguous tensors on `device`, of the graph's types and of shapes that `Signature.check` has
    passed, and returns new tensors: no later run writes to them. What was queued on torch's current stream is
    seen, and the results are ready for what is queued on it next. Threads may call `run` at the same time.
    """

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""
        ...

    def run(
        self, inputs: Mapping[str, Tensor], output_shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The outputs by name. Raises DiffcError when the runtime fails."""
        ...

    def close(self) -> None:
        """Free the weights and the memory. A closed session runs no more."""
        ...


@dataclass(frozen=True)
class ModelFile:
    """A compiled model to open: `file`, an engine or a graph, for `target` on `device`.

    `weights`: the ONNX model that fills an engine built without its weights. `identity`: the entries of graph and
    weights in the manifest, of which no two models have the same. `cache` gives a place of that name for what the
    runtime compiles, None where none can be written. `cuda_graph`: record the launches of each shape and replay them.
    """

    file: Path
    target: Target
    device: torch.device
    cache: Callable[[str], Path | None] = lambda _: None
    identity: tuple[Mapping[str, object], ...] = ()
    weights: Path | None = None
    cuda_graph: bool = False


class Runtime(Protocol):
    """The module that a target's `opens` names."""

    def why_not(self, target: Target) -> tuple[str, str]:
        """Why the target cannot be used here and what fixes it; empty when it can."""
        ...

    def open_session(self, model: ModelFile, signature: Signature) -> Session:
        """The session of a model. Raises DiffcError when it does not come up."""
        ...


def runtime_of(target: Target) -> Runtime:
    """The module that opens sessions of a target; importing it imports the runtime's libraries."""
    found: Runtime = importlib.import_module(target.opens)
    return found
