"""The picture of `diffc cache search --plot`."""

from __future__ import annotations

from pathlib import Path

from diffc.commands.cache_search.search import Found
from diffc.output_files import save_figure


def draw(found: Found, path: Path) -> None:
    """Write the heat map of changes (block by step) beside the curve of speed-up and PSNR, as PNG, SVG or PDF."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = found.measured
    height = max(3.5, 0.25 * len(measured.blocks))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, height), layout="constrained")
    image = left.imshow(measured.changes, aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=left, label="change since the step before")
    left.set_yticks(range(len(measured.blocks)), measured.blocks, fontsize=7)
    left.set_xlabel("step")
    right.plot([c.speedup for c in found.tried], [c.psnr for c in found.tried], "o")
    right.plot([found.best.speedup], [found.best.psnr], "*", markersize=14, label="proposed")
    right.set_xlabel("speed-up of the backbone's arithmetic")
    right.set_ylabel("PSNR of the latents to the full run (dB)")
    right.legend()
    save_figure(figure, path)
    pyplot.close(figure)
