"""What `diffc inspect` says of an artifact or a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from diffc.cli.listings import plain_table
from diffc.cli.tables import file_rows, lora_lines, made_for, megabytes
from diffc.terminal_text import cell, styled

if TYPE_CHECKING:
    from diffc.artifact.folder import Artifact
    from diffc.cli.terminal import Terminal
    from diffc.models.sources.locate import ModelSource


def inspected(what: Artifact | ModelSource, terminal: Terminal, *, passes: bool) -> None:
    """What an artifact holds, or what a model is."""
    from diffc.artifact.folder import Artifact

    if isinstance(what, Artifact):
        _artifact(what, terminal, passes=passes)
    else:
        _model(what, terminal)


def _artifact(artifact: Artifact, terminal: Terminal, *, passes: bool) -> None:
    manifest = artifact.manifest
    name, kind, dtype = manifest["model"]["name"], manifest["format"], manifest.get("dtype", "")
    terminal.line((f"{name}", "bold"), f", {kind}{' in ' + dtype if dtype else ''}, in {artifact.folder}")
    terminal.line(f"Compiled by diffc {manifest['diffc']} for {', '.join(manifest['targets'])}")
    terminal.line(made_for(manifest))
    for text in lora_lines(manifest):
        terminal.line(text)
    for row in file_rows(manifest):
        terminal.line(row)
    for title in ("inputs", "outputs"):
        for value in manifest[title]:
            dims = ", ".join(map(str, value["dims"]))
            terminal.line(f"  {title[:-1]:8} {value['name']}: {value['dtype'].lower()} [{dims}]")
    _checks(manifest, terminal)
    if passes:
        table = plain_table("pass", "changed", "check")
        for record in manifest.get("passes", ()):
            table.add_row(cell(record["name"]), str(record["changed"]), cell(record["check"]))
        terminal.print(table)
    else:
        changed = [record["name"] for record in manifest.get("passes", ()) if record["changed"]]
        terminal.line(f"{len(changed)} passes changed the graph: {', '.join(changed)}")
    terminal.result({"folder": str(artifact.folder), "manifest": dict(manifest)})


def _checks(manifest: Mapping[str, Any], terminal: Terminal) -> None:
    """One line on the comparison with torch."""
    worst: dict[str, float] = {}
    for report in manifest["validation"]:
        errors = [output["rel_l2"] or 0.0 for output in report["outputs"]]
        worst[report["arithmetic"]] = max(worst.get(report["arithmetic"], 0.0), *errors)
    if worst:
        figures = "; ".join(f"{error:.1e} in {arithmetic}" for arithmetic, error in worst.items())
        terminal.line(f"Compared with torch when it was compiled, relative L2 error: {figures}")
    else:
        terminal.line("Not compared with torch when it was compiled")


def _count(number: int) -> str:
    """A number of parameters for people: 1.87 M, 11.9 B."""
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _model(source: ModelSource, terminal: Terminal) -> None:
    from diffc.models.profiles import default_profile, painted_size
    from diffc.quantize.formats import FORMATS

    profile = asdict(default_profile(source.family, source.config, painted_size(source.pipeline_dir)))
    count, size = source.parameters, megabytes(source.nbytes).strip()
    terminal.line((source.name, "bold"), f", family {source.family}, {source.family.backbone_class}")
    terminal.line(f"  backbone {source.path}")
    terminal.line(f"  pipeline {source.pipeline_dir or 'none: calibration on prompts and painting need one'}")
    terminal.line(f"  {_count(count)} parameters in {len(source.weights)} tensors, {size} in {source.dtype}")
    terminal.line(made_for({"profile": profile}), " unless --profile says otherwise")
    found = _held(source, terminal)
    sizes = {f.name: count * (f.stored_bits or 8 * source.nbytes / count) / 8 for f in FORMATS.values()}
    about = ", ".join(f"{name} {megabytes(size).strip()}" for name, size in sizes.items())
    terminal.console.print(styled(f"About as large as: {about}"))
    terminal.result(
        {
            "name": source.name,
            "family": source.family.name,
            "backbone": str(source.path),
            "pipeline": None if source.pipeline_dir is None else str(source.pipeline_dir),
            "parameters": count,
            "bytes": source.nbytes,
            "dtype": source.dtype,
            "profile": profile,
            "config": dict(source.config),
            "bytes_by_format": sizes,
            **found,
        }
    )


def _held(source: ModelSource, terminal: Terminal) -> dict[str, Any]:
    """What a file holds quantized, layer by layer, what else is in it, and what compiles it."""
    from diffc.commands.look import layer_rule, look

    looked = look(source)
    for kind, names in looked.kinds.items():
        terminal.line(f"  {len(names)} layers {kind}: {layer_rule(names)}")
    if source.parts:
        terminal.line(f"  beside the backbone: {', '.join(source.parts)}")
    if looked.missing:
        terminal.line(f"  not in the file: {', '.join(looked.missing)}")
    terminal.line(f"Compile it: {looked.command}")
    held = {kind: list(names) for kind, names in looked.kinds.items()}
    return {"held": held, "parts": list(source.parts), "command": looked.command}
