"""The cache of the Hugging Face hub: models--OWNER--NAME/{refs,blobs,snapshots/COMMIT}. Nothing here is downloaded."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

_PREFIX = "models--"


def identity(folder: Path) -> tuple[str, str | None]:
    """The name and the commit of the model in `folder`: those of the hub for a snapshot in its cache.

    Any other folder has its own name, and no commit.
    """
    for inner, snapshots in pairwise((folder, *folder.parents)):
        if snapshots.name == "snapshots" and is_repository(snapshots.parent):
            return repository_id(snapshots.parent), inner.name
    return folder.name, None


def is_repository(folder: Path) -> bool:
    """Whether a folder is that of a model in the hub's cache."""
    return folder.name.startswith(_PREFIX) and (folder / "snapshots").is_dir()


def repository_id(folder: Path) -> str:
    """OWNER/NAME of models--OWNER--NAME."""
    return folder.name.removeprefix(_PREFIX).replace("--", "/")


def repository_folder(cache: Path, name: str) -> Path:
    """Where the hub's cache keeps the model OWNER/NAME."""
    return cache / (_PREFIX + name.replace("/", "--"))


def snapshot(repository: Path, revision: str | None) -> Path | None:
    """The snapshot folder of a branch, tag or commit in the cache, None when it is not there.

    Without a revision: the main branch, or the only snapshot.
    """
    snapshots = repository / "snapshots"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    if commit and (snapshots / commit).is_dir():
        return snapshots / commit
    there = [p for p in snapshots.iterdir() if p.is_dir()] if snapshots.is_dir() else []
    return there[0] if revision is None and len(there) == 1 else None
