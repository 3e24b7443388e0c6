"""What a reference gives at every module: the torch model, watched by hooks, or another graph, cut at its modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import torch

from diffc.validate.cuts import COMPUTED, extract, module_values
from diffc.validate.float32 import cpu_session, feed
from diffc.validate.onnx_reference import GraphReference
from diffc.validate.outputs import as_float32
from diffc.validate.torch_reference import TorchReference

Array = npt.NDArray[Any]


class ReferenceValues(Protocol):
    """A reference that tells what its modules give."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of what each module gives, by module path. Modules that give more than one value are left out."""
        ...

    def take(self, modules: Sequence[str]) -> dict[str, Array]:
        """What these modules give, as float32."""
        ...


def values_of(
    reference: TorchReference | GraphReference, shape: Any, seed: int, *, unrounded: bool
) -> ReferenceValues:
    """The values of `reference` for its random inputs at `shape`; `unrounded`: activations are not rounded."""
    if isinstance(reference, TorchReference):
        return TorchValues(reference, shape, seed, unrounded)
    return GraphValues(reference, shape, seed, unrounded)


@dataclass
class TorchValues:
    """The fake-quantized torch model, watched by hooks. Every call of `take` is a run."""

    reference: TorchReference
    shape: Any
    seed: int
    unrounded: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the floating-point tensors of modules that ran once."""
        found: dict[str, tuple[int, ...]] = {}
        calls: dict[str, int] = {}

        def see(module: str, out: torch.Tensor) -> None:
            calls[module] = calls.get(module, 0) + 1
            found[module] = tuple(out.shape)

        self._run([name for name, _ in self.reference.model.named_modules() if name], see)
        return {name: shape for name, shape in found.items() if calls[name] == 1}

    def take(self, modules: Sequence[str]) -> dict[str, Array]:
        """The outputs of `modules` in one run."""
        found: dict[str, Array] = {}

        def see(module: str, out: torch.Tensor) -> None:
            found[module] = out.detach().float().numpy().copy()

        self._run(modules, see)
        return found

    def _run(self, modules: Sequence[str], see: Any) -> None:
        watched = _watched(self.reference.model, modules, see)
        self.reference.forward(self.shape, self.seed, unrounded=self.unrounded, watched=watched)


@contextmanager
def _watched(model: torch.nn.Module, modules: Sequence[str], see: Any) -> Iterator[None]:
    """Call `see(module, output)` for every floating-point tensor that one of `modules` returns."""
    handles = []
    for name in modules:

        def hook(_: Any, __: Any, out: Any, name: str = name) -> None:
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                see(name, out)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class GraphValues:
    """Another graph, cut at its own modules."""

    def __init__(self, reference: GraphReference, shape: Any, seed: int, unrounded: bool):
        self._copy = reference.copy(unrounded=unrounded)
        self._tensors = {value.module: value.tensor for value in module_values(self._copy)}
        self._arrays = as_float32(reference.outputs(shape, seed, unrounded=unrounded)[0])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of every module of the graph."""
        return shapes_in(self._copy, self._tensors, self._arrays)

    def take(self, modules: Sequence[str]) -> dict[str, Array]:
        """One run of the graph with these values as outputs."""
        tensors = [self._tensors[module] for module in modules]
        part = extract(self._copy, tensors, {})
        with cpu_session(part) as session:
            out = session.run(inputs_of(part, self._arrays))
        return {m: np.asarray(out[t + COMPUTED], np.float32) for m, t in zip(modules, tensors, strict=True)}


def shapes_in(
    model: onnx.ModelProto, tensors: Mapping[str, str], arrays: Mapping[str, Array]
) -> dict[str, tuple[int, ...]]:
    """Shapes of `tensors` (module -> tensor), by module, from one run that keeps nothing else."""
    part = extract(model, [], {}, set(tensors.values()))
    with cpu_session(part) as session:
        out = session.run(inputs_of(part, arrays))
    return {module: tuple(int(n) for n in out[tensor + COMPUTED]) for module, tensor in tensors.items()}


def inputs_of(part: onnx.ModelProto, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs of `part` among `arrays`, in the types that it takes."""
    return feed(part, {v.name: arrays[v.name] for v in part.graph.input})
