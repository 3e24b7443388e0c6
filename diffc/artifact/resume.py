"""What a compile that was killed leaves, and when the next one may go on with it.

The unfinished folder holds `.resume/request`, the key of its compile: a hash of all that decides the result (see
`diffc.compile.request.request_key`). A compile with an equal key takes up calibration and weights. Any other starts
anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path

RESUME = ".resume"
"""Folder, inside the unfinished artifact, of what only an unfinished one needs."""
CHECKPOINT, WEIGHTS = "checkpoint", "model.onnx_data"
_KEPT = (RESUME, CHECKPOINT, WEIGHTS, f"{WEIGHTS}.partial")


def take_up(folder: Path, key: str) -> None:
    """Make `folder` ready for the compile of that key: keep what an equal one left there, remove all else.

    An empty key stands for a compile that nothing can go on with.
    """
    note = folder / RESUME / "request"
    if not key or _text(note) != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for path in folder.iterdir():
        if path.name not in _KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if key:
        note.parent.mkdir(exist_ok=True)
        note.write_text(key, encoding="utf-8")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def journal(folder: Path) -> Path | None:
    """Where the writer of weights keeps its journal; None where nothing is to be taken up."""
    return folder / RESUME / "weights.journal" if (folder / RESUME).is_dir() else None
