"""The tables of what diffc knows and finds: formats, passes, models, cache plans, the state of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Column, Table

from diffc.terminal_text import cell, styled

if TYPE_CHECKING:
    from diffc.backends.target import Target
    from diffc.cli.terminal import Terminal
    from diffc.commands.cache_search.search import Found
    from diffc.commands.doctor import Finding


def plain_table(*headers: str, title: str | None = None) -> Table:
    """A table without a frame, which a log and a narrow terminal show as well."""
    return Table(
        *(Column(cell(header)) for header in headers),
        title=None if title is None else cell(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )


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
    from diffc.quantize.formats import FORMAT_ALIASES, FORMATS

    table = plain_table("format", "weights", "inputs", "GPUs", "what it is")
    for fmt in FORMATS.values():
        bits = (None if b is None else f"{b:g} bit" for b in (fmt.stored_bits, fmt.input_bits))
        table.add_row(
            fmt.name + (" (+)" if fmt.mha else ""),
            *(text or "as stored" for text in bits),
            f"SM{fmt.min_sm}+",
            cell(fmt.summary),
        )
    terminal.print(table)
    terminal.line("(+) attention in FP8 as well, with --quantize-mha; needs float16 or bfloat16")
    for name in FORMATS:
        if others := [alias for alias, meant in FORMAT_ALIASES.items() if meant == name]:
            terminal.line(f"{name} is also called {', '.join(others)}")
    table = plain_table("format", *TARGETS, title="What each target does with it")
    for name in FORMATS:
        table.add_row(name, *(_taken(name, target) for target in TARGETS.values()))
    terminal.print(table)
    reasons: dict[str, list[str]] = {}
    for target in TARGETS.values():
        for name, how in {**target.emulates, **target.refuses}.items():
            reasons.setdefault(how, []).append(f"{name} in {target.name}")
    for fmt in FORMATS.values():
        reasons.setdefault(f"from SM{fmt.min_sm}: {fmt.evidence}", []).append(fmt.name)
    for how, where in reasons.items():
        terminal.console.print(styled(f"{', '.join(where)}: {how}"))
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
    from diffc.models.embedded.real import PIPELINES, REAL
    from diffc.models.sources.released_name import RELEASED

    table = plain_table("name", "family", "stored in", "what it is")
    rows = [(m.name, m.family, m.dtype, m.description) for m in EMBEDDED.values()]
    real = [
        (r.name, r.family, r.dtype, f"{r.description}, {r.parameters / 1e9:.2f} B parameters (*)")
        for r in REAL.values()
    ]
    real += [
        (p.name, p.backbone, p.dtype, f"{p.description}, {p.parameters / 1e9:.2f} B parameters (*)")
        for p in PIPELINES.values()
    ]
    for row in (*rows, *real):
        table.add_row(*map(cell, row))
    terminal.print(table)
    terminal.line(
        "(*) not here: `diffc compile NAME` downloads it from the Hugging Face hub, gated ones with --token;"
    )
    terminal.line("    one of the same size with random weights: diffc models make NAME DIR --random-weights")
    terminal.line("")
    table = plain_table(
        "short name", "on the Hugging Face hub", title="Names that MODEL can be, as in ModelOpt's scripts"
    )
    for name, identity in RELEASED.items():
        table.add_row(cell(name), cell(identity))
    terminal.print(table)
    keys = ("name", "family", "dtype", "description")
    terminal.result([dict(zip(keys, row, strict=True)) for row in (*rows, *real)])


def list_families(terminal: Terminal) -> None:
    """The classes of backbones that diffc knows, and what it does with all others."""
    from diffc.models.hints import HINTS
    from diffc.models.registry import FAMILIES

    rows: list[dict[str, Any]] = [
        {"name": f.name, "class": f.backbone_class, "interface": "family file", "refused": ""}
        for f in FAMILIES.values()
    ]
    rows += [
        {"name": hints.name, "class": kind, "interface": "pipeline", "refused": hints.refused}
        for kind, hints in HINTS.items()
    ]
    table = plain_table("name", "class of the backbone", "interface")
    for row in rows:
        table.add_row(row["name"], row["class"], "refused" if row["refused"] else row["interface"])
    terminal.print(table)
    terminal.line("interface: where inputs and sizes are known from; pipeline: read off a few calls of it.")
    terminal.line("Any other class is read off its pipeline as well, or the compile says why not.")
    for row in rows:
        if row["refused"]:
            terminal.line(f"refused, {row['name']}: {row['refused']}")
    terminal.result(rows)


def list_cache_plans(terminal: Terminal) -> None:
    """The presets with their arguments."""
    from diffc.cache.presets import PRESETS
    from diffc.models.registry import FAMILIES

    table = plain_table("plan", "for", "what is used again")
    suited: dict[str, list[str]] = {}
    for name, preset in PRESETS.items():
        arguments = ",".join(f"{key}={value:g}" for key, value in preset.defaults.items())
        plan = f"{name}:{arguments}" if arguments else name
        suited[name] = [family.name for family in FAMILIES.values() if name in family.cache_plans]
        table.add_row(plan, ", ".join(suited[name]), cell(preset.summary))
    terminal.print(table)
    terminal.result(
        [
            {"name": name, "arguments": dict(preset.defaults), "families": suited[name]}
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
