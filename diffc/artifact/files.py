"""Which files an artifact may name: those in its folder that its manifest lists, so that their hashes are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffc.errors import DiffcError
from passes.files.contained import why_outside

_FIX = "compile again, or get the artifact from a source that you trust"


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise DiffcError when the manifest names a file outside `folder`, or uses one that it does not list."""
    used = list(_used(manifest))
    for name in (*manifest["files"], *used):
        if reason := why_outside(folder, name):
            raise DiffcError(
                f"the manifest of {folder} names a file outside the artifact: {str(name)[:200]!r}: {reason}",
                fix=_FIX,
            )
    for name in used:
        listed(folder, manifest, name)


def listed(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """The path of `name` in an artifact that was loaded. Raises DiffcError when the manifest does not list it."""
    if name not in manifest["files"]:
        raise DiffcError(f"the manifest of {folder} lists no {name}", fix=_FIX)
    return folder / name


def _used(manifest: Mapping[str, Any]) -> Iterator[Any]:
    """Every name of a file that anything in the manifest but its list of files holds."""
    yield from manifest.get("targets", {}).values()
    for engine in manifest.get("engines", ()):
        yield engine["file"]
        if "weights" in engine:
            yield engine["weights"]
    for model in manifest.get("cache", {}).get("models", ()):
        yield from model["files"].values()
