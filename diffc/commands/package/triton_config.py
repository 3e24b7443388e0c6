"""config.pbtxt of a compiled backbone, by the schema of the server (model_config.proto).

max_batch_size, when it is above 0, means that the first axis of every input and output is the batch, which the
configuration's dims leave out, and that the server joins requests of equal shapes along it. A backbone whose inputs do
not all begin with the batch (a time that counts for all images, positions) has 0: dims are then whole shapes, and a
request is a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffc.backends.profile import Profile
from diffc.backends.signature import Signature, Value
from diffc.commands.package.pbtxt import Field, Word, message_text

TYPES = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
    "INT64": "TYPE_INT64",
    "INT32": "TYPE_INT32",
    "BOOL": "TYPE_BOOL",
}
"""Element types of `diffc.backends.signature` -> those of the server. bfloat16 is two bytes of each value, as sent."""
QUEUE_MICROSECONDS = 2000
"""How long a request waits for others of its shapes: little beside a denoising step."""


@dataclass(frozen=True)
class Backend:
    """A backend of the server: its name, that of its model format, and the file that it reads in a version's folder."""

    name: str
    platform: str
    file: str
    on_gpu: bool


@dataclass(frozen=True)
class ModelConfig:
    """What config.pbtxt says of a model named `name`. `profile` has the shapes of the compile."""

    name: str
    backend: Backend
    signature: Signature
    profile: Profile

    @property
    def batch(self) -> str | None:
        """The dimension that is the first axis of every input and output, and no other axis; None without one."""
        values = (*self.signature.inputs, *self.signature.outputs)
        first = {value.dims[0] if value.dims else None for value in values}
        name = first.pop() if len(first) == 1 else None
        others = {dim for value in values for dim in value.dims[1:]}
        return name if isinstance(name, str) and name not in others else None

    @property
    def max_batch(self) -> int:
        """max_batch_size: the largest batch of the compile, 0 where a batch is not shared by all."""
        return self.profile.inputs[self.signature.inputs[0].name].max[0] if self.batch else 0

    def text(self) -> str:
        """The content of config.pbtxt."""
        kind = Word("KIND_GPU" if self.backend.on_gpu else "KIND_CPU")
        fields: dict[str, Field] = {
            "name": self.name,
            "platform": self.backend.platform,
            "backend": self.backend.name,
            "default_model_filename": self.backend.file,
            "max_batch_size": self.max_batch,
            "input": [self._tensor(value) for value in self.signature.inputs],
            "output": [self._tensor(value) for value in self.signature.outputs],
            "instance_group": [{"count": 1, "kind": kind}],
        }
        if self.max_batch > 1:
            fields["dynamic_batching"] = {"max_queue_delay_microseconds": QUEUE_MICROSECONDS}
        fields["optimization"] = {
            "input_pinned_memory": {"enable": self.backend.on_gpu},
            "output_pinned_memory": {"enable": self.backend.on_gpu},
        }
        fields["model_warmup"] = [self._warm_up()]
        return message_text(fields)

    def _tensor(self, value: Value) -> Mapping[str, Field]:
        dims = _sizes(value.dims[1:] if self.max_batch else value.dims)
        found: dict[str, Field] = {"name": value.name, "data_type": Word(TYPES[value.dtype])}
        if dims:
            return {**found, "dims": dims}
        # dims cannot be empty. A scalar of a model without a batch is given as [1]; one for each image needs a reshape.
        return {**found, "dims": [1], **({"reshape": {"shape": []}} if self.max_batch else {})}

    def _warm_up(self) -> Mapping[str, Field]:
        """One call with zeros at the usual shapes, before the server says that the model is ready."""
        inputs: list[Field] = []
        for value in self.signature.inputs:
            shape = list(self.profile.inputs[value.name].opt)[1 if self.max_batch else 0 :]
            given: Field = {
                "data_type": Word(TYPES[value.dtype]),
                "dims": shape or [1],
                "zero_data": True,
            }
            inputs.append({"key": value.name, "value": given})
        # Of a model without max_batch_size the server wants 1 here.
        batch = self.profile.inputs[self.signature.inputs[0].name].opt[0] if self.max_batch else 1
        return {"name": "usual shapes", "batch_size": batch, "inputs": inputs}


def _sizes(dims: Sequence[Any]) -> list[int]:
    """Dimensions as the server writes them: -1 for one of any size."""
    return [dim if isinstance(dim, int) else -1 for dim in dims]
