"""What a training leaves beside its checkpoint: training.json, and the curve as a picture where matplotlib is there."""

from __future__ import annotations

import json
from typing import Any

from diffc.backends.install import install_command
from diffc.output_files import save_figure
from diffc.train.request import TrainResult
from passes.files.atomic import write_text

FIGURES, CURVE = "training.json", "training.png"


def save_report(result: TrainResult) -> list[str]:
    """Write both files into the checkpoint's folder; returns lines that say what was and was not written."""
    text = json.dumps(_plain(result.to_json()), indent=1, sort_keys=True) + "\n"
    write_text(result.output / FIGURES, text)
    try:
        figure = _drawn(result)
    except ImportError:
        return [
            f"figures are in {result.output / FIGURES}; for a picture of the curve: {install_command('plot')}"
        ]
    save_figure(figure, result.output / CURVE)
    return [f"the curve is in {result.output / CURVE}, its figures in {FIGURES}"]


def _plain(value: Any) -> Any:
    """Infinities as null: JSON has none."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and abs(value) == float("inf") else value


def _drawn(result: TrainResult) -> Any:
    """Loss and SNR by step, the kept weights marked. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    loss, snr = figure.subplots(1, 2)
    steps = [judgement.step for judgement in result.curve]
    loss.plot(steps, [judgement.loss for judgement in result.curve], "o-")
    loss.set(xlabel="step", ylabel="mean loss since the last point", yscale="log", title=result.method)
    with_start = [result.before, *result.curve]
    for name, style in (("snr", "o-"), ("seen", "s--")):
        points = [(j.step, getattr(j, name)) for j in with_start if getattr(j, name) is not None]
        if points:
            snr.plot(*zip(*points, strict=True), style, label={"snr": "unseen calls"}.get(name, "seen calls"))
    snr.axhline(result.before.snr, color="grey", linewidth=1, label="calibration alone")
    snr.plot([result.after.step], [result.after.snr], "*", markersize=14, label="kept")
    snr.set(xlabel="step", ylabel="signal to noise, dB", title=f"rate {result.rate:g}")
    snr.legend()
    return figure
