"""Traces of backbones, kept for one session of tests: half of what a small compile takes is its trace.

Two compiles of one model in one compute type whose quantizers are the same have the same trace, whatever their targets,
profile, cache plan and passes are. The second is given what the first made, as the bytes of its model.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import onnx

from diffc.models.sources.backbone import FakeBackbone
from diffc.models.sources.locate import ModelSource
from diffc.quantize.checkpoint import Checkpoint

Trace = Callable[..., onnx.ModelProto]


class Traces:
    """`trace` of `diffc.frontend.trace`, whose results all test processes of a session share under `root`.

    `made_once(folder, name, make)` gives the bytes of that name, which `make` makes on the first use. `allowed` is
    called before each trace, whether it is made or taken. `off` lets every trace be made.
    """

    def __init__(
        self, trace: Trace, root: Path, made_once: Callable[..., bytes], allowed: Callable[[], None]
    ) -> None:
        self._trace, self._root, self._made_once, self._allowed = trace, root, made_once, allowed
        self.off = False

    def __call__(
        self, source: ModelSource, *, dtype: str, checkpoint: Checkpoint | None, backbone: FakeBackbone
    ) -> onnx.ModelProto:
        self._allowed()
        if self.off:
            return self._trace(source, dtype=dtype, checkpoint=checkpoint, backbone=backbone)

        def make() -> bytes:
            model = self._trace(source, dtype=dtype, checkpoint=checkpoint, backbone=backbone)
            return bytes(model.SerializeToString())

        folder = self._root / key_of(source, dtype, checkpoint)
        return onnx.ModelProto.FromString(self._made_once(folder, "model.onnx", make))


def key_of(source: ModelSource, dtype: str, checkpoint: Checkpoint | None) -> str:
    """What a trace depends on: the model's config and recipes, the compute type, and all that the quantizers hold."""
    holds = (
        source.family.name,
        source.path,
        dict(source.config),
        sorted(source.weights.items()),
        dtype,
        checkpoint,
    )
    return hashlib.sha256(pickle.dumps(holds)).hexdigest()[:24]
