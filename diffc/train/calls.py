"""Calls of a backbone on disk: inputs by their graph names, and what the teacher answered.

Every tensor is a safetensors file named by its hash, so the text of a prompt, which all its denoising steps share, is
stored once. index.json says which tensors a call has. It appears when all calls are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from diffc.models.family import Family
from diffc.models.spec import Config
from passes.files.atomic import write_bytes, write_text

INDEX = "index.json"
ANSWER = "answer"
_KEPT = 256
"""Tensors of calls that stay in memory."""


@dataclass(frozen=True)
class Batch:
    """One step's data: the graph inputs by name, and the output to learn."""

    inputs: Mapping[str, Tensor]
    target: Tensor


@dataclass(frozen=True)
class Calls:
    """The recorded calls in `folder`. `by_row` names the inputs whose first dimension is the batch."""

    folder: Path
    by_row: frozenset[str]
    index: Sequence[Mapping[str, str]]

    @classmethod
    def load(cls, folder: Path, by_row: frozenset[str]) -> Calls:
        """The calls that `Recorder.finish` has completed."""
        return cls(folder, by_row, json.loads((folder / INDEX).read_text(encoding="utf-8")))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Batch:
        """A whole call, its tensors in the types that they were recorded in."""
        values = {
            name: _tensor(self.folder / f"{key}.safetensors") for name, key in self.index[number].items()
        }
        target = values.pop(ANSWER)
        return Batch(values, target)

    def draw(self, generator: torch.Generator, rows: int) -> Batch:
        """At most `rows` rows of one call, both at random."""
        whole = self[int(torch.randint(len(self), (1,), generator=generator))]
        count = len(whole.target)
        if rows >= count:
            return whole
        chosen = torch.randperm(count, generator=generator)[:rows]
        inputs = {
            name: value[chosen] if name in self.by_row else value for name, value in whole.inputs.items()
        }
        return Batch(inputs, whole.target[chosen])

    def spread(self, count: int) -> Iterator[Batch]:
        """`count` whole calls (or all), spread over the recording."""
        step = max(1, len(self) // count)
        return (self[number] for number in range(step // 2, len(self), step))


class Recorder:
    """Writes calls to a folder; `finish` completes it."""

    def __init__(self, folder: Path, by_row: frozenset[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._by_row = folder, by_row
        self._index: list[dict[str, str]] = []

    def add(self, inputs: Mapping[str, Tensor], answer: Tensor) -> None:
        """Keep one call; an input by row that comes with one row for all is repeated."""
        rows = len(answer)
        full = {
            name: value.expand(rows, *value.shape[1:]) if name in self._by_row and value.dim() else value
            for name, value in inputs.items()
        }
        tensors = {**full, ANSWER: answer}
        self._index.append({name: self._keep(tensor) for name, tensor in tensors.items()})

    def finish(self) -> Calls:
        """Write the index; what was recorded is complete from now on."""
        write_text(self._folder / INDEX, json.dumps(self._index) + "\n")
        return Calls(self._folder, self._by_row, self._index)

    def _keep(self, tensor: Tensor) -> str:
        content = save({"x": tensor.detach().cpu().contiguous()})  # its type and shape are in the header
        key = hashlib.sha256(content).hexdigest()[:32]
        file = self._folder / f"{key}.safetensors"
        if not file.exists():
            write_bytes(file, content)
        return key


def rows_of(family: Family, config: Config) -> frozenset[str]:
    """The graph inputs whose first dimension is the batch."""
    return frozenset(item.name for item in family.inputs(config) if item.dims[:1] == ("batch",))


@lru_cache(maxsize=_KEPT)
def _tensor(path: Path) -> Tensor:
    tensor: Tensor = load_file(path)["x"]
    return tensor
