"""What the commands print when they are done: tables, and what --json writes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from diffc.artifact.describe import IMPORTED, NOT_COMPARED
from diffc.cli.listings import plain_table
from diffc.terminal_text import cell, styled

if TYPE_CHECKING:
    from diffc.artifact.folder import Artifact
    from diffc.backends.target import Target
    from diffc.cli.terminal import Terminal
    from diffc.commands.generate import GenerateRequest, Painted
    from diffc.compile.plan import Plan
    from diffc.compile.request import CompileRequest
    from diffc.compile.spine import CompileResult
    from diffc.models.sources.locate import ModelSource
    from diffc.validate.modules import ModuleReport
    from diffc.validate.reports import ShapeReport
    from passes import PipelineResult
    from passes.pipeline import PassRecord


_WRONG, _NODES = 10, 6
"""Modules that are wrong, and nodes of each, that a table shows."""
_REFUSALS = 5
"""Refusals that a pass shows; a large model has hundreds of the same."""


def compiled(result: CompileResult, seconds: float, terminal: Terminal) -> None:
    """The comparison with torch, what was written, what it is made for, what it took, and what comes next."""
    from diffc.commands.inspect import next_command
    from diffc.memory import peak_rss
    from diffc.progress_bar import duration

    manifest, folder = result.artifact.manifest, result.artifact.folder
    imported = manifest["format"] == IMPORTED
    if result.validation:
        compared(result.validation, terminal, "ONNX Runtime against torch")
    elif imported:
        _checked(result.passes, terminal)
    else:
        terminal.line(("Not compared with torch", "yellow"))
    kind = IMPORTED if imported else f"to {manifest['format']}"
    terminal.line(("Compiled", "green"), f" {manifest['model']['name']} {kind} in {folder}")
    for row in file_rows(manifest):
        terminal.line(row)
    terminal.line(made_for(manifest))
    peak = peak_rss()
    memory = "" if peak is None else f", {peak / 1e9:.1f} GB of memory at most"
    terminal.line(f"Took {duration(seconds)}{memory}")
    terminal.line(f"Next: {next_command(result.artifact)}")
    terminal.result(
        {"folder": str(folder), "seconds": seconds, "peak_memory": peak, "manifest": dict(manifest)}
    )


def planned_from_file(request: CompileRequest, targets: Sequence[Target], terminal: Terminal) -> None:
    """What a compile of an .onnx file would make."""
    sms = "".join(f" SM{sm}" for sm in request.sms)
    names = ", ".join(target.name for target in targets)
    terminal.line(f"Would compile {request.model} as it is quantized, for {names}{sms}")
    terminal.line(f"Nothing was written to {request.output}")
    terminal.result({"model": request.model, "targets": [target.name for target in targets]})


def planned(plan: Plan, terminal: Terminal) -> None:
    """What a compile would make, and about how large."""
    from diffc.compile.plan import describe

    source, request = plan.source, plan.request
    bits = plan.format.stored_bits or (32 if plan.dtype == "float32" else 16)
    weights = source.parameters * bits / 8
    terminal.line(f"Would compile {describe(plan)}")
    terminal.line(made_for({"profile": plan.profile.described()}))
    names = ["model.onnx_data"]
    for target in (target for target in plan.targets if target.is_engine):
        sms = request.sms if target.ahead_of_time else (None,)
        names += [f"engines/{target.name}{'' if sm is None else f'-sm{sm}'}.engine" for sm in sms]
    for name in names:
        terminal.line(f"  {name:32} {megabytes(weights)}   about")
    checks = "layer by layer, for want of memory" if plan.streams_validation else "whole"
    terminal.line("Not compared with torch" if request.skip_validation else f"Compared with torch, {checks}")
    terminal.line(f"Nothing was written to {request.output}")
    terminal.result({"files": dict.fromkeys(names, weights), "profile": plan.profile.described()})


def file_rows(manifest: Mapping[str, Any]) -> list[str]:
    """A line for every graph, the weights and every engine, with its size."""
    left_out = set(manifest.get("left_out", ()))
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items() if name not in left_out}
    models = [name for name in sorted(sizes, key=len) if name.startswith("model") and name.endswith(".onnx")]
    rows = [f"  {name:32} {megabytes(sizes[name])}" for name in (*models, "model.onnx_data") if name in sizes]
    original = manifest["model"].get("bytes")
    if original and models and "model.onnx_data" in sizes:
        share = sizes["model.onnx_data"] / original
        rows[-1] += f"   {share:.0%} of the original's {megabytes(original).strip()}"
    for engine in (engine for engine in manifest["engines"] if engine["file"] in sizes):
        sms = " ".join(f"SM{sm}" for sm in engine["sms"]) or "this GPU"
        rows.append(
            f"  {engine['file']:32} {megabytes(sizes[engine['file']])}   built for {sms}, not run here"
        )
    return rows


def _checked(records: Sequence[PassRecord], terminal: Terminal) -> None:
    """How many passes were checked in numbers; of the others, why not."""
    changed = [record for record in records if record.changed]
    reasons: dict[str, list[str]] = {}
    for record in changed:
        if NOT_COMPARED in record.check:
            reason = record.check.partition(NOT_COMPARED)[2].strip(" :")
            reasons.setdefault(reason, []).append(record.name)
    if not reasons:
        terminal.line("Every pass was checked in numbers")
        return
    skipped = sum(map(len, reasons.values()))
    terminal.line(f"{len(changed) - skipped} of {len(changed)} passes were checked in numbers. Not compared:")
    for reason, names in reasons.items():
        terminal.line(f"  {', '.join(dict.fromkeys(names))}: {reason}")


def megabytes(count: float) -> str:
    """Bytes for people, right-aligned in 12 columns."""
    return f"{count / 1e6:9.2f} MB" if count < 1e9 else f"{count / 1e9:9.2f} GB"


def made_for(manifest: Mapping[str, Any]) -> str:
    """The shapes that the artifact is made for, in one line."""
    profile = manifest["profile"]
    if not isinstance(profile, Mapping):
        return "Made for the sizes of the ONNX file"
    low, best, high = (profile[key] for key in ("minimum", "optimum", "maximum"))

    def span(text: Any) -> str:
        ends = [text(low), text(high)]
        middle = f" (best {text(best)})" if text(best) not in ends or ends[0] != ends[1] else ""
        return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}{middle}"

    parts = (
        "batch " + span(lambda s: str(s["batch"])),
        span(lambda s: f"{s['height']}x{s['width']}") + " px",
        span(lambda s: str(s["text"])) + " tokens",
    )
    return "Made for " + ", ".join(parts)


def compared(reports: Sequence[ShapeReport], terminal: Terminal, title: str) -> None:
    """One row for every output at every shape, one column for every arithmetic: the difference and a verdict."""
    kinds = list(dict.fromkeys(report.arithmetic for report in reports))
    limits = {r.arithmetic: row.tolerance for r in reports for row in r.rows}
    headers = (f"{kind.replace(', ', ',' + chr(10))}\n(limit {limits.get(kind, 0):.0e})" for kind in kinds)
    table = plain_table("at", *headers, title=f"{title}: relative L2 error of the output")
    rows: dict[str, dict[str, Any]] = {}
    for report in reports:
        for row in report.rows:
            where = f"{report.model}, {report.shape}, seed {report.seed}"
            where += f", {row.name}" if len(report.rows) > 1 else ""
            rows.setdefault(where, {})[report.arithmetic] = _verdict(report, row)
    for where, cells in rows.items():
        table.add_row(cell(where), *(cells.get(kind, "") for kind in kinds))
    terminal.print(table)
    for report in (r for r in reports if r.chaotic):
        terminal.line(
            f"(*) ok: roundings of {report.arithmetic} alone move the reference by {report.floor:.1e} here,"
            " so the two differ by no more than the type itself changes"
        )
    if all(report.passed or report.chaotic for report in reports):
        terminal.line(("The compiled model is within all limits", "green"))


def _verdict(report: ShapeReport, row: Any) -> Any:
    error = "-" if row.rel_l2 is None else f"{row.rel_l2:.1e}"
    if row.passed:
        return styled(error, (" ok", "green"))
    return styled(error, (" ok (*)", "green")) if report.chaotic else styled(error, (" FAILED", "red"))


def modules_compared(modules: Mapping[str, Sequence[ModuleReport]], terminal: Terminal) -> None:
    """The modules that are wrong, first one first, and how many were compared."""
    for model, found in modules.items():
        for report in found:
            title = f"{model}, {report.modules} modules in {report.arithmetic}, each by itself"
            if report.wrong:
                terminal.print(_wrong_modules(title, report))
            else:
                terminal.line(f"{title}: ", ("all within their limit", "green"))
            if report.by_chance:
                terminal.line(
                    f"    {report.by_chance} more differ by no more than roundings of their inputs do"
                )


def _wrong_modules(title: str, report: ModuleReport) -> Table:
    table = plain_table("module", "node", "operator", "rel. L2", "limit", "nodes since the cut", title=title)
    for wrong in report.wrong[:_WRONG]:
        figures = f"{wrong.error:.2e}", f"{wrong.limit:.0e}"
        more = f"\nand {len(wrong.nodes) - _NODES} more" if len(wrong.nodes) > _NODES else ""
        value = wrong.value
        nodes = "\n".join(wrong.nodes[:_NODES]) + more
        table.add_row(cell(value.module), cell(value.node), cell(value.op), *figures, cell(nodes))
    if len(report.wrong) > _WRONG:
        table.caption = f"and {len(report.wrong) - _WRONG} more"
    return table


def optimized(result: PipelineResult, output: Path, terminal: Terminal) -> None:
    """One line per pass, its notes and refusals, and where the model lies."""
    table = plain_table("pass", "changed", "nodes", "check")
    for record in result.records:
        nodes = f"{record.nodes_before} -> {record.nodes_after}"
        table.add_row(cell(record.name), str(record.changed), nodes, cell(record.check))
    terminal.print(table)
    for record in result.records:
        for note in record.notes:
            terminal.line(f"  {record.name}: {note}")
        for refusal in record.refusals[:_REFUSALS]:
            terminal.line(f"  {record.name} left {refusal.node}: {refusal.reason}")
        if len(record.refusals) > _REFUSALS:
            terminal.line(f"  {record.name} left {len(record.refusals) - _REFUSALS} more")
    terminal.line(f"Wrote {output}")
    terminal.result({"output": str(output), "passes": [asdict(record) for record in result.records]})


def painted(results: Sequence[Painted], request: GenerateRequest, terminal: Terminal) -> None:
    """One line for each picture: seconds, likeness to the first, and what the classifier reads."""
    from diffc.commands.generate import verdict

    timed = "" if request.warm_up else ", with all that a first run sets up"
    for result in results:
        near = "" if result.psnr is None else f", PSNR {result.psnr:.1f} dB, SSIM {result.ssim:.3f}"
        said = verdict(result, request.prompt)
        terminal.line(f"  {result.name}: {result.seconds:.1f} s{timed}{near}{', ' + said if said else ''}")
    terminal.line(f"Painted {request.output}")
    keys = ("name", "seconds", "psnr", "ssim", "read")
    terminal.result(
        {"output": str(request.output), "pictures": [{key: getattr(r, key) for key in keys} for r in results]}
    )


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

    profile = default_profile(source.family, source.config, painted_size(source.pipeline_dir)).described()
    count, size = source.parameters, megabytes(source.nbytes).strip()
    terminal.line((source.name, "bold"), f", family {source.family}, {source.family.backbone_class}")
    terminal.line(f"  backbone {source.path}")
    terminal.line(f"  pipeline {source.pipeline_dir or 'none: calibration on prompts and painting need one'}")
    terminal.line(f"  {_count(count)} parameters in {len(source.weights)} tensors, {size} in {source.dtype}")
    terminal.line(made_for({"profile": profile}), " unless --profile says otherwise")
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
        }
    )
