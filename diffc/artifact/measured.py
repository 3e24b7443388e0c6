"""What a manifest says of a finished artifact: sizes, and how far it is from torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = {"weights": ".onnx_data", "engines": ".engine", "graphs": ".onnx"}
"""Kinds of files -> how their names end."""


def sizes_of(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of "weights", "engines", "graphs" and "other" files of the compile, and of "all"."""
    sizes = dict.fromkeys([*KINDS, "other"], 0)
    for name, entry in manifest["files"].items():
        kind = next((kind for kind, end in KINDS.items() if name.endswith(end)), "other")
        sizes[kind] += int(entry["bytes"])
    return sizes | {"all": sum(sizes.values())}


def errors_of(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The largest relative L2 error of any output and shape, by what ONNX Runtime computed in."""
    worst: dict[str, float] = {}
    for report in manifest.get("validation", ()):
        kind = str(report.get("arithmetic", ""))
        found = [float(output.get("rel_l2") or 0) for output in report.get("outputs", ())]
        worst[kind] = max([worst.get(kind, 0.0), *found])
    return worst
