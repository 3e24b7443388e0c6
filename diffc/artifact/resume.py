"""What a compile that was killed leaves, and when the next one may go on with it.

The unfinished folder holds `.resume/request`, a hash of all that decides the result: the request, the model's files,
this code, the libraries, the device. Equal hash: calibration and weights are taken up. Anything else: from the start.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError

if TYPE_CHECKING:
    from diffc.compile.plan import CompileRequest
    from diffc.quantize.checkpoint import Checkpoint

RESUME = ".resume"
"""Folder, inside the unfinished artifact, of what only an unfinished one needs."""
CHECKPOINT, WEIGHTS = "checkpoint", "model.onnx_data"
_KEPT = (RESUME, CHECKPOINT, WEIGHTS, f"{WEIGHTS}.partial")


def request_key(request: CompileRequest, folders: Iterable[Path], weights: str = "") -> str:
    """A hash of `request`, the files in `folders` (or files themselves) and all else that the result depends on.

    Files are known by path, size and time of change. `weights` is the fingerprint of the model's weights.
    """
    import torch

    from diffc.compile.manifest import versions

    # Where the result goes, and copies of graphs on the way, change nothing of it.
    wanted = asdict(replace(request, output=Path(), force=False, dump=None))
    given = [request.from_checkpoint] if request.from_checkpoint else []
    content = {
        "request": wanted,
        "files": list(_stats((*folders, *given))),
        "weights": weights,
        "code": _code(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _stats(places: Iterable[Path]) -> Iterator[list[Any]]:
    for place in places:
        files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        for file in files:
            stat = file.stat() if file.exists() else None  # what is missing is refused where it is read
            yield [str(file.resolve()), *((stat.st_size, stat.st_mtime_ns) if stat else ())]


@lru_cache(maxsize=1)
def _code() -> str:
    from passes.weights.journal import code_version

    digest = hashlib.sha256(code_version().encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


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


def kept_checkpoint(folder: Path) -> Checkpoint | None:
    """The calibration that an equal compile left in `folder`; None when there is none, or it is damaged."""
    from diffc.quantize.checkpoint import Checkpoint

    if not (folder / CHECKPOINT).is_dir():
        return None
    try:
        return Checkpoint.load(folder / CHECKPOINT)
    except DiffcError:
        shutil.rmtree(folder / CHECKPOINT)
        return None
