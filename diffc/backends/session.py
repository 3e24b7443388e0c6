"""The one interface behind which graphs run, whatever runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


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
