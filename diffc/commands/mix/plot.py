"""The picture of a mix: quality against size, beside every format by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from diffc.commands.mix.request import Mix
from diffc.output_files import save_figure


def draw(uniform: Sequence[Mix], curve: Sequence[Mix], best: Mix, path: Path) -> None:
    """Write the picture of quality against size, as PNG, SVG or PDF."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    finite = [one for one in curve if math.isfinite(one.snr)]
    axes.plot([one.bits for one in finite], [one.snr for one in finite], ".-", label="mixed")
    for one in uniform:
        axes.plot([one.bits], [one.snr], "s")
        axes.annotate(one.name, (one.bits, one.snr), xytext=(5, -10), textcoords="offset points")
    axes.plot([best.bits], [best.snr], "*", markersize=14, label="chosen")
    axes.set_xlabel("bits a weight, of the layers that can be quantized")
    axes.set_ylabel("signal to noise of the backbone's output (dB)")
    axes.legend()
    save_figure(figure, path)
    pyplot.close(figure)
