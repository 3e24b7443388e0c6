"""What two compiles of one session of tests have in common is computed once.

Traces of backbones are half of what a small compile takes. A trace reads no value: two compiles of one config in one
compute type whose quantizers are of one kind have the same graph, whatever their weights, amax, targets, profile, cache
plan and passes are. The second is given the graph that the first made, with the recipes of its own weights.

Outputs of graphs between the passes are a quarter: the same graph, with weights from the same places, gives the same
for the same inputs. What is compared with what, and how near it must be, is decided for every compile anew.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as ir

from diffc.frontend.recipes import attach_recipes
from diffc.frontend.trace import traced_quantizers
from diffc.models.sources.backbone import FakeBackbone
from diffc.models.sources.locate import ModelSource
from diffc.quantize.checkpoint import Checkpoint
from diffc.validate.passes import NumericCheck

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
        model = onnx.ModelProto.FromString(self._made_once(folder, "model.onnx", make))
        return with_weights(model, source, checkpoint)


Values = list[dict[str, npt.NDArray[Any]]]


def remembered_outputs(
    outputs: Callable[[Any, onnx.ModelProto], Values], root: Path, made_once: Callable[..., bytes]
) -> Callable[[NumericCheck, onnx.ModelProto], Values]:
    """`NumericCheck._outputs`, whose results all test processes of a session share under `root`.

    Weights in a folder of one test are files that the test may change: a graph that has such is run each time.
    """

    of_tests = json.dumps(str(root.parent.parent))[1:-1].encode()  # as recipes write it

    def found(check: NumericCheck, model: onnx.ModelProto) -> Values:
        content = model.SerializeToString(deterministic=True)
        if of_tests in content:
            return outputs(check, model)
        digest = hashlib.sha256(content)
        for name, array in (pair for values in check._inputs() for pair in sorted(values.items())):
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        kept = made_once(root, digest.hexdigest()[:24], lambda: pickle.dumps(outputs(check, model)))
        values: Values = pickle.loads(kept)
        return values

    return found


def with_weights(
    model: onnx.ModelProto, source: ModelSource, checkpoint: Checkpoint | None
) -> onnx.ModelProto:
    """The traced graph with the weights of `source` and the scales of `checkpoint` in the place of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a recipe is a place of external data that onnx_ir does not know
        graph = ir.serde.deserialize_model(model)
    traced = traced_quantizers(checkpoint, lambda name: source.weights[name].shape)
    attach_recipes(graph, source, traced, checkpoint)
    return ir.serde.serialize_model(graph)


def key_of(source: ModelSource, dtype: str, checkpoint: Checkpoint | None) -> str:
    """What a trace depends on: the model's config, the compute type, the settings and shapes of the quantizers."""
    holds = (
        source.family.name,
        source.family.interface,
        dict(source.config),
        {name: (recipe.shape, recipe.dtype) for name, recipe in sorted(source.weights.items())},
        sorted(source.exact),
        dtype,
        None if checkpoint is None else structure_of(checkpoint),
    )
    return hashlib.sha256(pickle.dumps(holds)).hexdigest()[:24]


def structure_of(checkpoint: Checkpoint) -> Any:
    """All of a checkpoint but the values and where they are from."""
    arrays = {**checkpoint.amax, **checkpoint.scaling}
    return (
        checkpoint.format,
        sorted((path, repr(settings)) for path, settings in checkpoint.settings.items()),
        sorted((path, value.shape, str(value.dtype)) for path, value in arrays.items()),
        sorted((name, recipe.shape, recipe.dtype) for name, recipe in checkpoint.weights.items()),
    )
