"""What the templates show of one artifact: its figures as text, and its charts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from diffc.report import charts, words
from diffc.report.layers import Layer, Side
from diffc.report.passes_view import passes_view
from diffc.report.subject import Subject

ROWS, WORST = 2000, 12
"""Rows of a table of layers, and layers of the table of errors that a page shows."""

View = dict[str, Any]


def view_of(subject: Subject) -> View:
    """Everything that the page shows of `subject`."""
    return {
        **outline(subject),
        **passes_view(subject),
        **_layers(subject.layers),
        **_errors(subject),
        **_stages(subject),
        **_cache(subject),
        **_repeat(subject),
        "engines": list(_engines(subject)),
    }


def outline(subject: Subject) -> View:
    """Name, title, figures on cards, and formats."""
    manifest, sizes = subject.manifest, subject.sizes
    sms = sorted({sm for engine in manifest["engines"] for sm in engine["sms"]})
    original = manifest["model"].get("bytes")
    share = f" ({sizes['weights'] / original:.0%} of the original)" if original else ""
    cards = [
        ("Model", manifest["model"]["name"]),
        ("Family", manifest["model"].get("family", "an ONNX file")),
        ("Format", manifest["format"]),
        ("Compute type", manifest.get("dtype", "-")),
        ("Targets", ", ".join(manifest["targets"])),
        ("GPUs of the engines", ", ".join(f"SM{sm}" for sm in sms) or "-"),
        ("Weights", words.size(sizes["weights"]) + share),
        ("Engines", words.size(sizes["engines"]) if sizes["engines"] else "-"),
        ("All files", words.size(sizes["all"])),
        *((f"Worst error, {kind}", words.error(value)) for kind, value in subject.errors.items()),
    ]
    if subject.run is not None:
        cards.append(("Compile", words.seconds(subject.run["seconds"])))
    if cache := manifest.get("cache"):
        cards.append(("Cache plan", cache["plan"].get("name", "custom")))
    cards += [("LoRA", f"{item['file']} x {item['weight']:g}") for item in manifest["model"].get("loras", ())]
    rows = _format_rows(subject.layers)
    return {
        "name": subject.name,
        "title": subject.title,
        "cards": cards,
        "made_for": words.profile(manifest["profile"]),
        "format_rows": rows,
        "command": subject.command,
    }


def _format_rows(layers: Sequence[Layer]) -> list[tuple[str, int, str]]:
    grouped: dict[str, list[Layer]] = {}
    for layer in layers:
        grouped.setdefault(layer.format, []).append(layer)
    return [
        (name, len(mine), words.count(sum(int(np.prod(layer.shape)) for layer in mine if layer.shape)))
        for name, mine in sorted(grouped.items(), key=lambda item: -len(item[1]))
    ]


def _layers(layers: Sequence[Layer]) -> View:
    rows = [
        (
            layer.path,
            " x ".join(map(str, layer.shape)) or "-",
            layer.weight.format,
            words.scale(layer.weight.low, layer.weight.high),
            layer.input.format,
            words.scale(layer.input.low, layer.input.high),
        )
        for layer in layers[:ROWS]
    ]
    drawn = []
    for side, what in (("weight", "weights"), ("input", "inputs")):
        ends = [(layer.path, *_ends(getattr(layer, side))) for layer in layers]
        known = [(path, low, high) for path, low, high in ends if low and high]
        if known:
            drawn.append(charts.ranges(known, f"scale of {what}", f"Scales of {what}, smallest to largest"))
    return {"layer_rows": rows, "layer_charts": drawn, "more_layers": max(0, len(layers) - ROWS)}


def _ends(side: Side) -> tuple[float, float]:
    return side.low or 0.0, side.high or 0.0


def _errors(subject: Subject) -> View:
    rows = [
        (
            report.get("model", "model.onnx"),
            ", ".join(f"{axis} {value}" for axis, value in dict(report.get("shape", {})).items()),
            report.get("arithmetic", ""),
            output.get("name", ""),
            words.error(output.get("rel_l2")),
            words.error(output.get("tolerance")),
            "" if output.get("passed") else "roundings alone move it so far",
        )
        for report in subject.manifest.get("validation", ())
        for output in report.get("outputs", ())
    ]
    noise = subject.noise
    if noise is None:
        return {"error_rows": rows, "noise_chart": None}
    return {
        "error_rows": rows,
        "noise_chart": charts.heat(
            noise.snr,
            noise.layers,
            "denoising step",
            "signal to noise, dB",
            "Signal to noise by layer and step",
            reverse=True,
        ),
        "noise_text": noise.text,
        "noise_rows": [(p, step, f"{low:.1f}", f"{all_:.1f}") for p, step, low, all_ in noise.worst(WORST)],
    }


def _engines(subject: Subject) -> Iterator[View]:
    for engine in subject.engines:
        entry = engine.entry
        sms = ", ".join(f"SM{sm}" for sm in entry["sms"]) or "the GPU of the machine"
        yield {
            "title": entry["file"],
            "text": f"{entry['target']} {entry['version']} for {sms}, {words.size(engine.bytes)},"
            f" built in {words.seconds(entry.get('seconds'))}",
            "kinds": [(kind.type, kind.reads, kind.gives, number) for kind, number in engine.kinds],
            "layers": [(x.name, x.type, x.reads, x.gives) for x in engine.layers[: ROWS // 2]],
            "count": len(engine.layers),
        }


def _stages(subject: Subject) -> View:
    run = subject.run
    if run is None or not run["stages"]:
        return {"stage_charts": ()}
    every = [*run["stages"], *({**b, "title": f"builder of {b['title']}"} for b in run.get("builders", ()))]
    drawn = [
        charts.bars([(s["title"], s["seconds"]) for s in run["stages"]], "seconds", "Seconds of each stage")
    ]
    held = [(s["title"], s["memory"] / 1e9) for s in every if s.get("memory")]
    if held:
        drawn.append(charts.bars(held, "GB held at most", "Memory of each stage"))
    rest = run["seconds"] - sum(stage["seconds"] for stage in run["stages"])
    return {
        "stage_charts": drawn,
        "stage_rows": [(s["title"], f"{s['seconds']:.2f}", words.size(s.get("memory"))) for s in every],
        "stage_text": f"{words.seconds(run['seconds'])} in all, {words.seconds(max(0.0, rest))} of them between stages."
        " Memory is the most that the process held while a stage ran; builders are processes of their own.",
    }


def _cache(subject: Subject) -> View:
    schedule = subject.schedule
    if schedule is None:
        return {"schedule_chart": None}
    files = subject.manifest["files"]
    models = subject.manifest["cache"]["models"]
    names = [(m["suffix"] or "whole", name) for m in models for name in dict.fromkeys(m["files"].values())]
    text = (
        f"Plan {schedule.name}, layout {schedule.layout}: {schedule.computed:.0%} of the squares of"
        f" {len(schedule.blocks)} blocks and {schedule.steps} steps are computed. Blocks are not equally large."
    )
    return {
        "schedule_chart": charts.grid(
            schedule.reused,
            schedule.blocks,
            "denoising step",
            f"Blocks that step by step are computed or used again: {text}",
        ),
        "schedule_text": text,
        "schedule_rows": [(suffix, name, words.size(files[name]["bytes"])) for suffix, name in names],
    }


def _repeat(subject: Subject) -> View:
    manifest = subject.manifest
    prompts = subject.request.get("prompts") or ()
    in_memory = "object" in manifest["model"]
    return {
        "prompts": list(prompts),
        "prompts_title": "The prompts of the calibration, for prompts.txt",
        "no_command": "its model was in memory" if in_memory else "the artifact does not hold the request",
        "versions": sorted({"diffc": manifest.get("diffc", "-"), **manifest.get("versions", {})}.items()),
        "files": [
            (name, f"{entry['bytes']:,}", entry["sha256"]) for name, entry in manifest["files"].items()
        ],
    }
