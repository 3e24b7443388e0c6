"""What the commands print when they are done: tables, and what --json writes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from diffc.artifact.describe import IMPORTED
from diffc.terminal import cell, styled

if TYPE_CHECKING:
    from diffc.backends.target import Target
    from diffc.cli.terminal import Terminal
    from diffc.commands.cache_search.search import Found
    from diffc.commands.doctor import Finding
    from diffc.commands.generate import GenerateRequest, Painted
    from diffc.compile.spine import CompileResult
    from diffc.validate.modules import ModuleReport
    from diffc.validate.reports import ShapeReport
    from passes import PipelineResult


_WRONG, _NODES = 10, 6
"""Modules that are wrong, and nodes of each, that a table shows."""
_REFUSALS = 5
"""Refusals that a pass shows; a large model has hundreds of the same."""


def plain_table(*headers: str, title: str | None = None) -> Table:
    """A table without a frame, which a log and a narrow terminal show as well."""
    return Table(
        *headers,
        title=None if title is None else cell(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )


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
        terminal.line("Every pass was checked: the table of `diffc inspect --passes` says how")
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


def file_rows(manifest: Mapping[str, Any]) -> list[str]:
    """A line for every graph, the weights and every engine, with its size."""
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    models = [name for name in sorted(sizes, key=len) if name.startswith("model") and name.endswith(".onnx")]
    rows = [f"  {name:32} {megabytes(sizes[name])}" for name in (*models, "model.onnx_data") if name in sizes]
    original = manifest["model"].get("bytes")
    if original and "model.onnx_data" in sizes:
        share = sizes["model.onnx_data"] / original
        rows[-1] += f"   {share:.0%} of the original's {megabytes(original).strip()}"
    for engine in manifest["engines"]:
        sms = " ".join(f"SM{sm}" for sm in engine["sms"]) or "this GPU"
        rows.append(
            f"  {engine['file']:32} {megabytes(sizes[engine['file']])}   built for {sms}, not run here"
        )
    return rows


def megabytes(count: int) -> str:
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


def list_passes(rows: Sequence[tuple[str, str, str]], terminal: Terminal, *, short: bool) -> None:
    """Name, options and docstring of passes; `short`: name and first sentence, one line each."""
    for name, options, text in rows:
        if short:
            terminal.line((f"{name:24} ", "bold"), text.splitlines()[0])
            continue
        terminal.line((name, "bold"), f" {{{options}}}" if options else "")
        for row in text.splitlines():
            terminal.line(f"    {row}" if row else "")
        terminal.line("")
    terminal.result([{"name": name, "options": options, "text": text} for name, options, text in rows])


def list_formats(terminal: Terminal) -> None:
    """The formats: what they store, which GPUs have them, what each target does with them, and the reasons."""
    from diffc.backends.target import TARGETS
    from diffc.quantize.formats import FORMATS

    table = plain_table("format", "weights", "inputs", "GPUs", "what it is")
    for fmt in FORMATS.values():
        bits = (None if b is None else f"{b:g} bit" for b in (fmt.stored_bits, fmt.input_bits))
        table.add_row(
            fmt.name + (" (+)" if fmt.mha else ""),
            *(text or "as stored" for text in bits),
            f"SM{fmt.min_sm} and newer",
            cell(fmt.summary),
        )
    terminal.print(table)
    terminal.line("(+) attention in FP8 as well, with --quantize-mha; needs float16 or bfloat16")
    table = plain_table("format", *TARGETS, title="What each target does with it")
    for name in FORMATS:
        table.add_row(name, *(_taken(name, target) for target in TARGETS.values()))
    terminal.print(table)
    reasons: dict[str, list[str]] = {}
    for target in TARGETS.values():
        for name, how in {**target.emulates, **target.refuses}.items():
            reasons.setdefault(how, []).append(f"{name} in {target.name}")
    for how, where in reasons.items():
        terminal.console.print(styled(f"{', '.join(where)}: {how}"))
    for fmt in FORMATS.values():
        terminal.console.print(styled(f"{fmt.name} from SM{fmt.min_sm}: {fmt.evidence}"))
    terminal.result([_format_row(fmt.name) for fmt in FORMATS.values()])


def _taken(name: str, target: Target) -> str:
    if name in target.refuses:
        return "no"
    return "emulated" if name in target.emulates else "yes"


def _format_row(name: str) -> dict[str, Any]:
    from diffc.backends.target import TARGETS
    from diffc.quantize.formats import FORMATS

    fmt = FORMATS[name]
    return {
        "name": name,
        "weight_bits": fmt.stored_bits,
        "input_bits": fmt.input_bits,
        "min_sm": fmt.min_sm,
        "attention": fmt.mha,
        "targets": {target.name: _taken(name, target) for target in TARGETS.values()},
        "summary": fmt.summary,
        "evidence": fmt.evidence,
    }


def examined(findings: Sequence[Finding], terminal: Terminal) -> None:
    """What `diffc doctor` found, and below it the command for everything that can be fixed."""
    table = plain_table("what", "", "")
    for finding in findings:
        works = cell("ok", "green") if finding.works else cell("no", "yellow")
        table.add_row(cell(finding.what), works, cell(finding.detail))
    terminal.print(table)
    for finding in findings:
        if not finding.works and finding.fix:
            terminal.line(f"{finding.what}: {finding.fix}")
    terminal.result([asdict(finding) for finding in findings])


def list_models(terminal: Terminal) -> None:
    """The embedded models, and the real ones that `diffc models make --random-weights` writes."""
    from diffc.models.embedded.catalogue import EMBEDDED
    from diffc.models.embedded.real import REAL

    table = plain_table("name", "family", "stored in", "what it is")
    rows = [(m.name, m.family, m.dtype, m.description) for m in EMBEDDED.values()]
    real = [
        (r.name, r.family, r.dtype, f"{r.description}, {r.parameters / 1e9:.2f} B parameters (*)")
        for r in REAL.values()
    ]
    for row in (*rows, *real):
        table.add_row(*map(cell, row))
    terminal.print(table)
    terminal.line("(*) the configuration alone. A compile takes the downloaded folder of such a model;")
    terminal.line("    one of the same size with random weights: diffc models make NAME DIR --random-weights")
    keys = ("name", "family", "dtype", "description")
    terminal.result([dict(zip(keys, row, strict=True)) for row in (*rows, *real)])


def list_cache_plans(terminal: Terminal) -> None:
    """The presets with their arguments."""
    from diffc.cache.presets import PRESETS

    table = plain_table("plan", "for", "what is used again")
    for name, preset in PRESETS.items():
        arguments = ",".join(f"{key}={value:g}" for key, value in preset.defaults.items())
        plan = f"{name}:{arguments}" if arguments else name
        table.add_row(plan, ", ".join(preset.families), cell(preset.summary))
    terminal.print(table)
    terminal.result(
        [
            {"name": name, "arguments": dict(preset.defaults), "families": list(preset.families)}
            for name, preset in PRESETS.items()
        ]
    )


def plans_tried(found: Found, terminal: Terminal) -> None:
    """The plans that a search ran, fastest first."""
    table = plain_table("plan", "speed-up", "PSNR of the latents")
    for tried in found.tried:
        mark = " *" if tried is found.best else ""
        table.add_row(cell(tried.plan.name + mark), f"{tried.speedup:.2f}", f"{tried.psnr or 0:.1f} dB")
    terminal.print(table)
    rows = [{"plan": t.plan.to_json(), "speedup": t.speedup, "psnr": t.psnr} for t in found.tried]
    terminal.result({"best": found.best.plan.to_json(), "tried": rows})


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
