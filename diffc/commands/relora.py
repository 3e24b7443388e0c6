"""`diffc relora`: a finished artifact with other LoRAs in its weights, without calibrating again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from diffc.artifact.folder import Artifact
from diffc.artifact.model import check_there
from diffc.artifact.resume import CHECKPOINT
from diffc.backends.target import EngineOptions
from diffc.compile.request import CompileRequest, CompileResult
from diffc.compile.spine import compile_model
from diffc.errors import DiffcError
from diffc.models.sources.lora_files import LoraSpec
from diffc.models.sources.source import HubOptions
from diffc.progress import Reporter
from diffc.quantize.formats import find_format
from diffc.quantize.options import QuantOptions


@dataclass(frozen=True)
class ReloraRequest:
    """`artifact` compiled again into `output` with `loras` in the place of those that it has; none for the base.

    `model` is where the diffusers model lies now, None for where the compile found it.
    """

    artifact: Path
    output: Path
    loras: tuple[LoraSpec, ...] = ()
    partial: bool = False
    model: str | None = None
    skip_validation: bool = False
    force: bool = False


def relora(request: ReloraRequest, ui: Reporter | None = None) -> CompileResult:
    """Write the artifact with other LoRAs: weights anew from the model's files, engines again.

    The calibration is that of the artifact: scales of activations stay, those of changed weights are found anew.
    Raises DiffcError for an artifact of an ONNX file, and for a format whose calibration depends on the weights
    (SmoothQuant, AWQ, SVDQuant), which must be compiled again; and what a compile raises.
    """
    artifact = Artifact.load(request.artifact)
    return compile_model(relora_request(artifact, request), ui)


def relora_request(artifact: Artifact, request: ReloraRequest) -> CompileRequest:
    """The compile that makes the new artifact. Raises DiffcError as `relora` does."""
    manifest = artifact.manifest
    if "family" not in manifest["model"]:
        raise DiffcError(
            f"{artifact.folder} was compiled from an ONNX file",
            fix="add the LoRA to the file, diffc opt FILE.onnx -p 'fuse-lora{file=LORA}' -o NEW.onnx, and compile that",
        )
    if "object" in manifest["model"] and request.model is None:
        raise DiffcError(
            f"{artifact.folder} was compiled from a model in memory",
            fix="save that with save_pretrained, and say where it lies: --model DIR",
        )
    if request.model is None:
        check_there(artifact, "--model DIR")
    fmt = find_format(manifest["format"])
    if fmt.algorithm not in ("max", None):
        raise DiffcError(
            f"the calibration of {fmt.name} depends on the weights, which LoRAs change",
            fix="compile again, with --lora",
        )
    checkpoint = artifact.folder / CHECKPOINT if fmt.algorithm is not None else None
    if checkpoint is not None and not checkpoint.is_dir():
        raise DiffcError(
            f"{artifact.folder} has no calibration (diffc slim leaves it out)",
            fix="give the artifact that diffc compile wrote",
        )
    old = request_of(manifest["request"])
    return replace(
        old,
        model=request.model or old.model,
        output=request.output,
        from_checkpoint=checkpoint,
        loras=request.loras,
        lora_partial=request.partial,
        skip_validation=request.skip_validation,
        force=request.force,
    )


_PATHS = ("output", "from_checkpoint", "save_checkpoint", "dump")


def request_of(values: Mapping[str, Any]) -> CompileRequest:
    """The request that a manifest holds, as far as this version knows its entries; places to write are left out."""
    known = {f.name for f in fields(CompileRequest)} - {*_PATHS, "force", "hub", "options", "engine", "loras"}
    plain = {key: _tuples(value) for key, value in values.items() if key in known}
    return CompileRequest(
        **plain,
        output=Path(),
        hub=HubOptions.from_json(values.get("hub", {})),
        options=QuantOptions(**_known(QuantOptions, values.get("options", {}))),
        engine=EngineOptions(**_known(EngineOptions, values.get("engine", {}))),
    )


def _known(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    return {key: _tuples(value) for key, value in values.items() if key in names}


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
