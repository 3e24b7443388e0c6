"""What the commands print when they are done: tables and where things lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from diffc.artifact.describe import IMPORTED, NOT_COMPARED
from diffc.terminal_text import cell, styled

if TYPE_CHECKING:
    from diffc.backends.target import Target
    from diffc.commands.doctor import Finding
    from diffc.compile.request import CompileResult
    from diffc.validate.modules import ModuleReport
    from diffc.validate.reports import ShapeReport
    from passes import PipelineResult
    from passes.pipeline import PassRecord


_FINDINGS, _NODES = 10, 6
"""Modules that are off, and nodes of each, that a table shows."""
_REFUSALS = 5
"""Refusals that a pass shows; a large model has hundreds of the same."""


def compiled(result: CompileResult, console: Console) -> None:
    """The validation table, the engines, and where the artifact lies."""
    manifest, folder = result.artifact.manifest, result.artifact.folder
    imported = manifest["format"] == IMPORTED
    if result.validation:
        compared(result.validation, console, "ONNX Runtime against torch")
    elif imported:
        _checked(result.passes, console)
    else:
        console.print(styled(("Not validated", "yellow")))
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    kind = IMPORTED if imported else f"to {manifest['format']}"
    console.print(styled(("Compiled", "green"), f" {manifest['model']['name']} {kind} in {folder}"))
    models = [name for name in sorted(sizes, key=len) if name.startswith("model") and name.endswith(".onnx")]
    shown = [*models, "model.onnx_data", *(e["file"] for e in manifest["engines"])]
    for name in (n for n in shown if n in sizes):
        console.print(styled(f"  {name:32} {sizes[name] / 1e6:9.2f} MB"))
    console.print("  manifest.json, validation/        how it was made and checked")


def _checked(records: Sequence[PassRecord], console: Console) -> None:
    """How many passes were checked in numbers; of the others, why not."""
    changed = [record for record in records if record.changed]
    reasons: dict[str, list[str]] = {}
    for record in changed:
        if NOT_COMPARED in record.check:
            reason = record.check.partition(NOT_COMPARED)[2].strip(" :")
            reasons.setdefault(reason, []).append(record.name)
    if not reasons:
        console.print("Every pass was checked in numbers")
        return
    skipped = sum(map(len, reasons.values()))
    console.print(f"{len(changed) - skipped} of {len(changed)} passes were checked in numbers. Not compared:")
    for reason, names in reasons.items():
        console.print(f"  {', '.join(dict.fromkeys(names))}: {reason}", markup=False, soft_wrap=True)


def compared(reports: Sequence[ShapeReport], console: Console, title: str) -> None:
    """One row for every output at every shape: how far it is off, and how far it may be."""
    table = Table("model", "shape", "computed in", "rel. L2", "limit", "cosine", title=cell(title))
    for report in reports:
        for row in report.rows:
            limit = f"3 x {report.floor or 0:.1e} (*)" if report.chaotic else f"{row.tolerance:.0e}"
            figures = (
                "-" if row.rel_l2 is None else f"{row.rel_l2:.2e}",
                limit if row.passed or report.chaotic else styled(f"{limit} ", ("FAILED", "red")),
                "-" if row.cosine is None else f"{row.cosine:.6f}",
            )
            table.add_row(*map(cell, (report.model, report.shape, report.arithmetic)), *figures)
    console.print(table)
    if any(report.chaotic for report in reports):
        console.print(
            "(*) float roundings in its layers, measured, move the reference's own output by as much"
        )


def bisected(bisections: Mapping[str, Sequence[ModuleReport]], console: Console) -> None:
    """The modules that are wrong, first one first, and how many were compared."""
    for model, found in bisections.items():
        for report in found:
            title = f"{model}, {report.modules} modules in {report.arithmetic}, each by itself"
            if not report.wrong:
                console.print(styled(f"{title}: ", ("all within their limit", "green")), soft_wrap=True)
            else:
                console.print(_wrong_modules(title, report))
            if report.by_chance:
                console.print(
                    f"    {report.by_chance} more differ by no more than roundings of their inputs do"
                )


def _wrong_modules(title: str, report: ModuleReport) -> Table:
    table = Table("module", "node", "operator", "rel. L2", "limit", "nodes of the piece", title=cell(title))
    for wrong in report.wrong[:_FINDINGS]:
        figures = f"{wrong.error:.2e}", f"{wrong.limit:.0e}"
        nodes = "\n".join(wrong.nodes[:_NODES])
        more = f"\nand {len(wrong.nodes) - _NODES} more" if len(wrong.nodes) > _NODES else ""
        names = map(cell, (wrong.value.module, wrong.value.node, wrong.value.op))
        table.add_row(*names, *figures, cell(nodes + more))
    if len(report.wrong) > _FINDINGS:
        table.caption = f"and {len(report.wrong) - _FINDINGS} more"
    return table


def optimized(result: PipelineResult, output: Path, console: Console) -> None:
    """One line per pass, its notes and refusals, and where the model lies."""
    table = Table("pass", "changed", "nodes", "check")
    for record in result.records:
        nodes = f"{record.nodes_before} -> {record.nodes_after}"
        table.add_row(*map(cell, (record.name, record.changed, nodes, record.check)))
    console.print(table)
    for record in result.records:
        for note in record.notes:
            console.print(styled(f"  {record.name}: {note}"))
        for refusal in record.refusals[:_REFUSALS]:
            console.print(styled(f"  {record.name} left {refusal.node}: {refusal.reason}"))
        if len(record.refusals) > _REFUSALS:
            console.print(styled(f"  {record.name} left {len(record.refusals) - _REFUSALS} more"))
    console.print(styled(f"Wrote {output}"))


def list_passes(console: Console) -> None:
    """Name, options and docstring of every pass."""
    from diffc.commands.optimize import known_passes

    for name, options, text in known_passes():
        console.print(styled((name, "bold"), f" {{{options}}}" if options else ""))
        console.print(
            "\n".join(f"    {line}" for line in text.splitlines()) + "\n", markup=False, soft_wrap=True
        )


def list_formats(console: Console) -> None:
    """The formats: what they store, which compute capabilities have them and why, and what each target does."""
    from diffc.backends.target import KNOWN_SMS, TARGETS
    from diffc.quantize.formats import FORMATS

    table = Table("format", "weights", "inputs", "GPUs", *TARGETS, "what it is")
    for fmt in FORMATS.values():
        table.add_row(
            fmt.name + (" (+mha)" if fmt.mha else ""),
            "as stored" if fmt.stored_bits is None else f"{fmt.stored_bits:g} bit",
            "as stored" if fmt.input_bits is None else f"{fmt.input_bits} bit",
            " ".join(f"SM{sm}" for sm in KNOWN_SMS if sm >= fmt.min_sm),
            *(_taken(fmt.name, target) for target in TARGETS.values()),
            fmt.summary,
        )
    console.print(table)
    console.print("(+mha): attention in FP8 as well, with --quantize-mha; needs float16 or bfloat16")
    for target in TARGETS.values():
        for name, how in {**target.emulates, **target.refuses}.items():
            console.print(f"{target.name}, {name}: {how}", markup=False)
    for fmt in FORMATS.values():
        console.print(f"{fmt.name} from SM{fmt.min_sm}: {fmt.evidence}", markup=False)


def _taken(name: str, target: Target) -> str:
    if name in target.refuses:
        return "no"
    return "emulated" if name in target.emulates else "yes"


def examined(findings: Sequence[Finding], console: Console) -> None:
    """What `diffc doctor` found, and below it the command for everything that can be fixed."""
    table = Table("what", "", "")
    for finding in findings:
        table.add_row(
            cell(finding.what),
            cell("works", "green") if finding.works else cell("no", "yellow"),
            cell(finding.detail),
        )
    console.print(table)
    for finding in findings:
        if not finding.works and finding.fix:
            console.print(f"{finding.what}: {finding.fix}", markup=False, soft_wrap=True)


def list_models(console: Console) -> None:
    """The embedded models, and the real ones that `diffc models make --random-weights` writes."""
    from diffc.models.embedded.catalogue import EMBEDDED
    from diffc.models.embedded.real import REAL

    table = Table("name", "family", "stored in", "what it is")
    for model in EMBEDDED.values():
        table.add_row(model.name, model.family, model.dtype, model.description)
    table.add_section()
    for real in REAL.values():
        size = f"{real.description}, {real.parameters / 1e9:.2f} B parameters (*)"
        table.add_row(real.name, real.family, real.dtype, size)
    console.print(table)
    console.print("(*) the configuration. With random weights: diffc models make NAME DIR --random-weights")
