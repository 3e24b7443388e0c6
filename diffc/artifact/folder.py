"""The folder that a compile writes: model.onnx, its weights, engines, checks, and a manifest of them all.

The folder is built beside its final place and renamed when it is complete. A compile that ends early, by an error,
Ctrl-C or a crash, leaves nothing under the final name. A finished calibration stays in the unfinished folder, and the
next compile of the same request takes it up (see `diffc.artifact.resume`).

A copy for a deployment may lack files: those of the folders OPTIONAL, and what the manifest names under "left_out".
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffc.artifact.files import check_files
from diffc.artifact.resume import RESUME, keep_calibration, take_up
from diffc.artifact.schema import Manifest
from diffc.backends.install import UPGRADE
from diffc.errors import DiffcError
from diffc.output_files import check_output_file
from diffc.output_folders import one_writer, take_place
from diffc.records import check_record, read_record
from diffc.version import VERSION
from passes.files.contained import why_outside

MANIFEST = "manifest.json"
SCHEMA = 1
"""The newest form of the manifest that this diffc reads and writes. It reads all older ones, from 1 on."""
RUN = "records/run.json"
"""Seconds and memory of the compile: the one file that the manifest does not list, since no two compiles share it."""
OPTIONAL = ("validation/", "checkpoint/", "engines/", "records/")
"""Folders whose files a copy of an artifact may lack: no other file needs them to be loaded."""
AGAIN = "compile again, or get the artifact from a source that you trust"
_CHUNK = 1 << 22
_READINGS = 20
"""How often an artifact that is replaced while it is read is read again."""


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder and the content of manifest.json."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def model(self) -> Path:
        """The compiled ONNX model."""
        return self.folder / "model.onnx"

    @property
    def missing(self) -> tuple[str, ...]:
        """The files of the compile that this copy lacks, by name."""
        return tuple(name for name in self.manifest["files"] if not (self.folder / name).is_file())

    @property
    def engines(self) -> tuple[Mapping[str, Any], ...]:
        """The entries of the manifest's engines whose files are here."""
        missing = set(self.missing)
        return tuple(e for e in self.manifest["engines"] if not missing & {e["file"], e.get("weights")})

    def present(self, name: str) -> Path:
        """The path of the file `name`. Raises DiffcError when this copy lacks it."""
        if name in self.missing:
            raise DiffcError(
                f"{self.folder} has no {name}: it was left out of this copy",
                fix="use the whole artifact, or copy it with that file: diffc slim",
            )
        return self.folder / name

    @classmethod
    def load(cls, folder: Path) -> Artifact:
        """Open an artifact.

        Raises DiffcError when it is none, was written by a newer diffc, lacks files that are not optional, or names
        files outside its folder.
        """
        for _ in range(_READINGS):
            before = _stamp(folder)
            try:
                return cls._load(folder)
            except DiffcError:
                if _stamp(folder) == before:
                    raise  # else another process has replaced it in the meantime
        return cls._load(folder)

    @classmethod
    def _load(cls, folder: Path) -> Artifact:
        path = folder / MANIFEST
        if not folder.exists():
            raise DiffcError(
                f"there is nothing at {folder}",
                fix="say where the artifact lies now, or make one: diffc compile",
            )
        if not path.is_file():
            raise DiffcError(
                f"{folder} is not a diffc artifact: it has no {MANIFEST}", fix="make one: diffc compile"
            )
        if why := why_outside(folder, MANIFEST):
            raise DiffcError(f"{path} lies outside the artifact: {why}", fix=AGAIN)
        manifest = read_record(path, fix=AGAIN)
        check_schema(path, manifest.get("schema"))
        if "package" in manifest:
            raise DiffcError(
                f"{folder} is a package, not an artifact", fix="give the artifact that it was made of"
            )
        check_record(manifest, path, Manifest, fix=AGAIN)
        check_files(folder, manifest)
        left_out = set(manifest.get("left_out", ()))
        for name, entry in manifest["files"].items():
            file = folder / name
            optional = name.startswith(OPTIONAL) or name in left_out
            if optional and not file.exists():
                continue
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise DiffcError(f"{file} is missing or not {entry['bytes']} bytes long", fix="compile again")
        return cls(folder, manifest)

    def verify(self) -> None:
        """Hash every file that is here again.

        Raises DiffcError naming the first that was changed, or saying that another process has replaced the artifact.
        """
        missing = set(self.missing)
        for name, entry in self.manifest["files"].items():
            try:
                wrong = name not in missing and file_sha256(self.folder / name) != entry["sha256"]
            except FileNotFoundError:
                wrong = True
            if wrong and self._was_replaced():
                raise DiffcError(f"{self.folder} was replaced while it was read", fix="run the command again")
            if wrong:
                raise DiffcError(f"{self.folder / name} was changed after the compile", fix="compile again")

    def _was_replaced(self) -> bool:
        try:
            return read_record(self.folder / MANIFEST, fix=AGAIN) != self.manifest
        except DiffcError:
            return True


def _stamp(folder: Path) -> tuple[int, ...]:
    """What tells one artifact at `folder` from the next: the identity and time of its manifest; () without one."""
    try:
        found = (folder / MANIFEST).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def check_schema(path: Path, schema: object) -> None:
    """Raise DiffcError when this diffc does not read manifests of that schema; it reads every older one."""
    if not isinstance(schema, int) or schema < 1:
        raise DiffcError(f"{path} is damaged: its schema is {schema!r}", fix=AGAIN)
    if schema > SCHEMA:
        raise DiffcError(
            f"{path} was written by a newer diffc: it has schema {schema}, and this diffc ({VERSION}) reads up to"
            f" {SCHEMA}",
            fix=UPGRADE,
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def staging(
    output: Path, *, force: bool, key: str = "", note: Callable[[str], None] = lambda text: None
) -> Iterator[Path]:
    """A folder to build an artifact in; it takes the place of `output` when the block ends without an error.

    It is empty, or holds what an unfinished compile of the same `key` left (see `diffc.artifact.resume`). When the
    block ends by an error or Ctrl-C, a calibration in it is kept, and `note` is told so.
    Raises DiffcError before any work when `output` exists (unless `force` and it is an artifact), or when
    another process is writing it. A full disk inside the block becomes a DiffcError too.
    """
    check_output(output, force=force)
    with ExitStack() as held:
        try:
            partial = held.enter_context(one_writer(output))
        except OSError as error:
            raise DiffcError(
                f"cannot write to {output.parent}: {error.strerror}", fix="choose another -o"
            ) from error
        check_output(output, force=force)  # once more: another writer may have been here first
        with _filled(partial, output, key, note) as folder:
            yield folder


@contextmanager
def _filled(partial: Path, output: Path, key: str, note: Callable[[str], None]) -> Iterator[Path]:
    """`staging` while its lock is held."""
    kept = False
    try:
        partial.mkdir(exist_ok=True)
        take_up(partial, key)
        try:
            yield partial
        except (Exception, KeyboardInterrupt):
            kept = keep_calibration(partial)
            if kept:
                note(f"the calibration is kept in {partial}: the same command goes on with it")
            raise
        if (partial / RESUME).exists():  # what cannot be removed must not get into the artifact
            shutil.rmtree(partial / RESUME)
        take_place(partial, output)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiffcError(
            f"no space left on the disk of {output}", fix="free some space, or choose another -o"
        ) from error
    finally:
        if not kept:
            shutil.rmtree(partial, ignore_errors=True)


def check_output(output: Path, *, force: bool) -> None:
    """Raise DiffcError when `output` may not be written: only an artifact is replaced, and only with `force`."""
    if not output.exists():
        return
    if output.is_dir() and not any(output.iterdir()):
        return
    if not (output / MANIFEST).is_file():
        raise DiffcError(
            f"{output} exists and is not a diffc artifact", fix="choose another -o, or remove it"
        )
    if not force:
        raise DiffcError(f"{output} exists", fix="give --force to replace it, or choose another -o")


def check_model_output(output: Path, *, model: Path, force: bool) -> None:
    """Raise DiffcError when the .onnx file `output`, made of the file `model`, may not be written.

    It may not when it or its weights exist (unless `force`), when it is `model` itself, and without its folder. Weights
    alone, beside the journal of who wrote them, are what a killed command has left: the next one goes on with them.
    """
    taken = [path for path in (output, output.with_name(output.name + "_data")) if path.exists()]
    if output not in taken and output.with_name(output.name + "_data.journal").is_file():
        taken = []
    if taken and (not force or output.resolve() == model.resolve()):
        raise DiffcError(f"{taken[0]} exists", fix="choose another -o, or give --force")
    if not output.parent.is_dir():
        raise DiffcError(f"no such folder: {output.parent}", fix="make it, or choose another -o")
    for path in (output, output.with_name(output.name + "_data")):
        check_output_file(path)


def write_manifest(folder: Path, content: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """Write manifest.json: `content` and every file's size and hash. `hashes` holds those known already."""
    files = {}
    for name in file_names(folder):
        path = folder / name
        files[name] = {"bytes": path.stat().st_size, "sha256": hashes.get(name) or file_sha256(path)}
    return save_manifest(folder, {"schema": SCHEMA, **content, "files": files})


def file_names(folder: Path) -> tuple[str, ...]:
    """The files that the manifest of an artifact, finished or not, lists: sorted, with forward slashes."""
    found = (p for p in folder.rglob("*") if p.is_file() and RESUME not in p.parts)
    names = (p.relative_to(folder).as_posix() for p in sorted(found) if p != folder / MANIFEST)
    return tuple(name for name in names if not f"/{name}".endswith(f"/{RUN}"))  # nor that of an expert in it


def save_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write `manifest` as manifest.json, and return it."""
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest
