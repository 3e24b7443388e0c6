"""What a file of weights is: for which base, in which formats, and the command that compiles it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffc.models.single.files import SUFFIXES
from diffc.models.sources.locate import ModelSource


@dataclass(frozen=True)
class Looked:
    """A model whose layers are quantized, or in one file.

    `kinds`: layers by what their weights are, with what their inputs go through ("fp8, inputs fp8"). `missing`: parts
    of a pipeline that the file does not have. `command`: what compiles it.
    """

    kinds: Mapping[str, list[str]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    command: str = ""


def look(source: ModelSource) -> Looked:
    """What a model holds quantized, and the command that compiles it as it is."""
    kinds: dict[str, list[str]] = {}
    for name, layer in source.held.items():
        title = layer.kind if layer.input is None else f"{layer.kind}, inputs {layer.input.kind}"
        if layer.pre_quant_scale is not None:
            title += ", channels scaled"
        kinds.setdefault(title, []).append(name)
    single = source.path.suffix in SUFFIXES
    missing = (
        () if not single else tuple(part for part in ("text encoder", "VAE") if part not in source.parts)
    )
    return Looked(kinds, missing, _command(source))


def _command(source: ModelSource) -> str:
    """The command line that compiles a model: its own codes, or FP8 where it has none."""
    model = str(source.pipeline_dir or source.path)
    words = ["diffc", "compile", model, "--format", "stored" if source.held else "fp8"]
    if not source.held and source.pipeline_dir is None:
        words += ["--calibrate", "synthetic"]
    return shlex.join([*words, "-o", f"build/{Path(model).stem}"])


def layer_rule(names: list[str]) -> str:
    """Names of layers in few words: those that differ in numbers alone are one, with a star."""
    rules: dict[str, int] = {}
    for name in names:
        rule = re.sub(r"\d+", "*", name)
        rules[rule] = rules.get(rule, 0) + 1
    return ", ".join(f"{rule} ({count})" if count > 1 else rule for rule, count in rules.items())
