"""`diffc.session`: an artifact as numpy arrays in and out, in ONNX Runtime; torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from diffc.artifact.folder import Artifact
from diffc.backends.onnxruntime.arrays import OrtSession, array_type
from diffc.backends.signature import Signature, Value
from diffc.backends.target import RUNTIMES, Target
from diffc.errors import DiffcError, unknown_value
from diffc.models.registry import family_of_manifest

Array = npt.NDArray[Any]
TARGETS = ("ort", "ort-cuda")
"""Targets that take numpy arrays: ONNX Runtime's own providers."""


class ArraySession:
    """The compiled backbone of an artifact over numpy arrays. Threads may call `run` at the same time.

    Names are those of the graph. A cache plan is not followed: every call runs the whole backbone.
    """

    def __init__(self, artifact: Artifact, target: Target):
        """Open the graph of `target`. Raises DiffcError when it does not come up; nothing falls back."""
        self._signature = _signature(artifact)
        model = artifact.present(artifact.manifest["targets"][target.name])
        self._session = OrtSession(model, (target.provider,))

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Name, element type (as ONNX calls it) and dimensions of each input, in graph order."""
        return self._signature.inputs

    @property
    def outputs(self) -> tuple[Value, ...]:
        """The same of the outputs."""
        return self._signature.outputs

    def run(self, feed: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        """The outputs by name, in the graph's types; inputs are cast to theirs.

        Raises DiffcError for a missing or unknown name, and for shapes that the backbone does not take.
        """
        missing = [value.name for value in self.inputs if value.name not in feed]
        unknown = [name for name in feed if name not in {value.name for value in self.inputs}]
        if missing or unknown:
            listed = ", ".join(value.name for value in self.inputs)
            raise DiffcError(f"{(missing or unknown)[0]}: no value, or no such input", fix=f"give {listed}")
        arrays = {value.name: _cast(feed[value.name], value) for value in self.inputs}
        self._signature.check({name: array.shape for name, array in arrays.items()})
        return self._session.run(arrays)

    def close(self) -> None:
        """Free the session and its weights. A closed session runs no more."""
        self._session.close()

    def __enter__(self) -> ArraySession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def session(artifact: str | Path, *, target: str | None = None, verify: bool = False) -> ArraySession:
    """An artifact as a session of ONNX Runtime over numpy arrays.

    `target`: ort (the CPU) or ort-cuda, by default the first of these that the artifact was compiled for. `verify`:
    hash every file first. Raises DiffcError when the artifact is damaged or was compiled for neither, or the provider
    is not there.
    """
    found = Artifact.load(Path(artifact).expanduser().absolute())
    if verify:
        found.verify()
    chosen = RUNTIMES[_target(found, target)]
    if chosen.on_cpu and found.manifest.get("dtype") == "bfloat16":
        raise DiffcError(
            f"{found.folder} computes in bfloat16, for which ONNX Runtime's CPU provider has no kernels",
            fix="compile with --dtype float16 or float32",
        )
    return ArraySession(found, chosen)


def _target(artifact: Artifact, wanted: str | None) -> str:
    if wanted is not None and wanted not in TARGETS:
        raise unknown_value("target for numpy arrays", wanted, TARGETS)
    there = [name for name in TARGETS if name in artifact.manifest["targets"] and wanted in (None, name)]
    if not there:
        raise DiffcError(
            f"{artifact.folder} was compiled for {', '.join(artifact.manifest['targets'])}",
            fix=f"compile with --target {wanted or 'ort'}, or run it with torch: diffc.load",
        )
    return there[0]


def _signature(artifact: Artifact) -> Signature:
    """The graph's own, with the limits of the family where it is known."""
    model = artifact.manifest["model"]
    known = "family" in model and "interface" not in artifact.manifest
    return Signature.of(artifact.manifest, family_of_manifest(model).dims(model["config"]) if known else ())


def _cast(given: npt.ArrayLike, value: Value) -> Array:
    array, dtype = np.asarray(given), array_type(value.dtype)
    return array if array.dtype == dtype else array.astype(dtype)
