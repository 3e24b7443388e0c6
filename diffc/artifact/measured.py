"""What a manifest says of a finished artifact: sizes, and how far it is from torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sizes_of(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of weights, graphs and engines, and of all files together."""
    files = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
    return {
        "weights": sum(size for name, size in files.items() if name.endswith(".onnx_data")),
        "graphs": sum(size for name, size in files.items() if name.endswith(".onnx") and "/" not in name),
        "engines": sum(size for name, size in files.items() if name.endswith(".engine")),
        "all": sum(files.values()),
    }


def errors_of(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The largest relative L2 error of any output and shape, by what ONNX Runtime computed in."""
    worst: dict[str, float] = {}
    for report in manifest.get("validation", ()):
        kind = str(report.get("arithmetic", ""))
        found = [float(output.get("rel_l2") or 0) for output in report.get("outputs", ())]
        worst[kind] = max([worst.get(kind, 0.0), *found])
    return worst
