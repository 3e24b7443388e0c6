"""An imported graph under the names of its family: diffusers calls the one, the runtime knows the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffc.backends.session import Session
from diffc.backends.signature import Signature, Value
from diffc.models.family import Family
from diffc.models.spec import Config


@dataclass(frozen=True)
class Interface:
    """The entry "interface" of a manifest: the family's names of inputs and outputs -> the file's.

    `dims`: the file's dynamic dimensions -> the family's.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    dims: Mapping[str, str]

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> Interface | None:
        """The interface of an artifact; None where the graph has the family's own names."""
        entry = manifest.get("interface")
        return None if entry is None else cls(entry["inputs"], entry["outputs"], entry["dims"])

    def with_dims(self, signature: Signature, family: Family, config: Config) -> Signature:
        """The file's `signature` with the family's dimensions. The output has those that the family says."""
        inputs = tuple(self._value(value) for value in signature.inputs)
        dims = family.output_dims(config)
        return replace(
            signature, inputs=inputs, outputs=tuple(replace(v, dims=dims) for v in signature.outputs)
        )

    def with_names(self, signature: Signature) -> Signature:
        """The same with the family's names."""
        ours = {name: own for own, name in (*self.inputs.items(), *self.outputs.items())}
        inputs = tuple(replace(value, name=ours[value.name]) for value in signature.inputs)
        outputs = tuple(replace(value, name=ours[value.name]) for value in signature.outputs)
        return replace(signature, inputs=inputs, outputs=outputs, profiles=())

    def _value(self, value: Value) -> Value:
        dims = tuple(self.dims.get(d, d) if isinstance(d, str) else d for d in value.dims)
        return replace(value, dims=dims)


class NamedSession:
    """A `Session` that takes and gives the family's names, and runs one that has the file's.

    `inner` is the signature of that session, against which shapes are checked: its profiles have its own names.
    """

    def __init__(self, session: Session, interface: Interface, inner: Signature):
        self._session, self._names, self._inner = session, interface, inner

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""
        return self._session.device

    def run(
        self, inputs: Mapping[str, Tensor], output_shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The outputs by the family's names. Raises DiffcError as the session does."""
        feed = {self._names.inputs[name]: tensor for name, tensor in inputs.items()}
        self._inner.check({name: tuple(tensor.shape) for name, tensor in feed.items()})
        shapes = {self._names.outputs[name]: shape for name, shape in output_shapes.items()}
        found = self._session.run(feed, shapes)
        return {own: found[name] for own, name in self._names.outputs.items()}

    def close(self) -> None:
        """Free the weights and the memory."""
        self._session.close()
