"""What the commands that make something print when they are done, and what --json writes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffc.artifact.describe import IMPORTED, NOT_COMPARED
from diffc.backends.sm import with_cards
from diffc.cli.comparisons import compared
from diffc.cli.listings import plain_table
from diffc.terminal_text import cell

if TYPE_CHECKING:
    from diffc.backends.target import Target
    from diffc.cli.terminal import Terminal
    from diffc.commands.generate import GenerateRequest, Painted
    from diffc.compile.plan import Plan
    from diffc.compile.request import CompileRequest
    from diffc.compile.spine import CompileResult
    from passes import PipelineResult
    from passes.pipeline import PassRecord


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
    for applied in source.loras:
        terminal.line(f"LoRA: {applied.summary()}")
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


def lora_lines(manifest: Mapping[str, Any]) -> list[str]:
    """A line for every LoRA in the weights, and one for slots that take others."""
    lines = []
    for item in manifest["model"].get("loras", ()):
        layers = ", ".join(f"{count} {kind}" for kind, count in item["layers"].items())
        lines.append(f"LoRA in the weights: {item['file']} (weight {item['weight']:g}), {layers} layers")
    if slots := manifest.get("lora_slots"):
        lines.append(f"LoRA slots: {len(slots['layers'])} layers, up to rank {slots['rank']}")
    return lines


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
        sms = ", ".join(map(with_cards, engine["sms"])) or "this GPU"
        rows.append(f"  {engine['file']:32} {megabytes(sizes[engine['file']])}   for {sms}, not run here")
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
        return _made_for_ranges(manifest, profile)
    low, best, high = (profile[key] for key in ("minimum", "optimum", "maximum"))

    def span(text: Any) -> str:
        ends = [text(low), text(high)]
        middle = f" (best {text(best)})" if text(best) not in ends or ends[0] != ends[1] else ""
        return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}{middle}"

    parts = [
        "batch " + span(lambda s: str(s["batch"])),
        span(lambda s: f"{s['height']}x{s['width']}") + " px",
        *([span(lambda s: str(s["frames"])) + " frames"] if high.get("frames", 1) > 1 else []),
        span(lambda s: str(s["text"])) + " tokens",
    ]
    return "Made for " + ", ".join(parts)


def _made_for_ranges(manifest: Mapping[str, Any], profiles: Sequence[Mapping[str, Any]]) -> str:
    """The same of an ONNX file of no known family, by the names of its dimensions."""
    sizes: dict[str, str] = {}
    for value in manifest["inputs"]:
        for axis, name in enumerate(value["dims"]):
            if isinstance(name, str):
                ranges = (entry["inputs"][value["name"]] for entry in profiles)
                bounds = [[each[end][axis] for end in ("min", "opt", "max")] for each in ranges]
                sizes[name] = " and ".join(":".join(map(str, each)) for each in bounds) or "any"
    stated = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return f"Made for {stated}" if stated else "Made for the sizes of the ONNX file, all fixed"


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
