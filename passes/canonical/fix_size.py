"""fix-size: a named dimension of a graph becomes a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassError, PassResult, register, walk


@register
@dataclass(frozen=True)
class FixSize(Pass):
    """Let the dimension called `axis` be `size`, in inputs, outputs and between; 0 leaves it as it is.

    The model then takes inputs of this size alone (a runtime refuses others), and passes know it: fuse-skip-norm
    wants a batch that is a number. A name that the graph does not have changes nothing. Raises PassError on a negative
    size.
    """

    name: ClassVar[str] = "fix-size"
    axis: str = "batch"
    size: int = 0

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite shapes; no node changes."""
        if self.size < 0:
            raise PassError(
                f"fix-size cannot make {self.axis!r} {self.size}: sizes are 1 or more"
                ". Fix: give a size of 1 or more"
            )
        changed = 0
        for part in walk(graph) if self.size else ():
            for tensor in part.tensors().values():
                shape = tensor.shape if isinstance(tensor, gs.Variable) else None
                if shape is not None and self.axis in shape:
                    tensor.shape = [self.size if dim == self.axis else dim for dim in shape]
                    changed += 1
        return PassResult(changed, (f"{changed} tensors",) if changed else ())
