"""What a compile that did not finish leaves, and when the next one may go on with it.

The unfinished folder holds `.resume/request`, the key of its compile: a hash of all that decides the result (see
`diffc.compile.request.request_key`). A compile with an equal key takes up calibration and weights. Any other starts
anew. A compile that was killed leaves both. One that ended by an error or Ctrl-C leaves its calibration, finished or
begun, since that can have taken hours.
"""

from __future__ import annotations

import shutil
from pathlib import Path

RESUME = ".resume"
"""Folder, inside the unfinished artifact, of what only an unfinished one needs."""
CHECKPOINT, WEIGHTS = "checkpoint", "model.onnx_data"
_CALIBRATED, _REQUEST, _BEGUN = "calibrated", "request", "calibration"
_KEPT = (RESUME, CHECKPOINT, WEIGHTS, f"{WEIGHTS}.partial")


def take_up(folder: Path, key: str) -> None:
    """Make `folder` ready for the compile of that key: keep what an equal one left there, remove all else.

    An empty key stands for a compile that nothing can go on with.
    """
    note = folder / RESUME / _REQUEST
    if not key or _text(note) != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for path in folder.iterdir():
        if path.name not in _KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if key:
        note.parent.mkdir(exist_ok=True)
        note.write_text(key, encoding="utf-8")


def calibration_work(folder: Path) -> Path | None:
    """Where a calibration keeps how far it is; None where nothing is to be taken up."""
    return folder / RESUME / _BEGUN if (folder / RESUME).is_dir() else None


def mark_calibrated(folder: Path) -> None:
    """Note that the checkpoint in the unfinished `folder` took a calibration, and is worth keeping."""
    if (folder / RESUME).is_dir():
        (folder / RESUME / _CALIBRATED).touch()
        shutil.rmtree(folder / RESUME / _BEGUN, ignore_errors=True)


def keep_calibration(folder: Path) -> bool:
    """Remove all of an unfinished folder but its calibration and its key; False, and no change, without these."""
    begun = any((folder / RESUME / _BEGUN).rglob("*.pt"))
    finished = (folder / RESUME / _CALIBRATED).is_file() and (folder / CHECKPOINT).is_dir()
    if not begun and not finished:
        return False
    others = (path for path in folder.iterdir() if path.name not in (RESUME, CHECKPOINT))
    kept = (_REQUEST, _CALIBRATED, _BEGUN)
    journals = (path for path in (folder / RESUME).iterdir() if path.name not in kept)
    for path in (*others, *journals):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return True


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def journal(folder: Path) -> Path | None:
    """Where the writer of weights keeps its journal; None where nothing is to be taken up."""
    return folder / RESUME / "weights.journal" if (folder / RESUME).is_dir() else None
