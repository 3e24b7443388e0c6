"""A place for finished folders that several machines reach, by fsspec: a folder, S3, and whatever else it knows.

A folder is there when its record is, the file that is written last and names the others with their sizes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffc.artifact.folder import AGAIN, MANIFEST, Artifact, check_schema
from diffc.artifact.schema import Manifest
from diffc.errors import DiffcError
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.folder import RECORD
from diffc.records import of_pass_error, parse_record
from passes.base import PassError
from passes.files.bounded import TEXT_BYTES
from passes.files.contained import contained

_CALIBRATIONS = ".calibrations"


class Store:
    """The folders below `url`, by their names."""

    def __init__(self, url: str) -> None:
        """Open the store; nothing is written. Raises DiffcError for an address that fsspec cannot open."""
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise DiffcError(
                f"cannot open the store {url}: {error}",
                fix="write file:///FOLDER, or s3://BUCKET/FOLDER after pip install s3fs",
            ) from error

    def address(self, name: str) -> str:
        """The address of the folder `name`."""
        return f"{self.url}/{name}"

    def record(self, name: str, file: str) -> bytes | None:
        """The bytes of the record of the folder `name`; None where it is not there."""
        path = self._path(name, file)
        with self._failing(f"read {file} of {name}"):
            if not self._fs.exists(path):
                return None
            if self._fs.size(path) > TEXT_BYTES:
                raise DiffcError(f"{self.address(name)}/{file} is too large to be a record", fix=AGAIN)
            return bytes(self._fs.cat_file(path))

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of every file of the folder `name`, by its name below it."""
        root = self._path(name)
        with self._failing(f"list {name}"):
            self._fs.invalidate_cache()
            found = self._fs.find(root, detail=True)
        prefix = len(root.rstrip("/")) + 1
        return {path[prefix:]: int(info["size"]) for path, info in found.items()}

    def put(self, folder: Path, name: str, record: str) -> None:
        """Copy all files of `folder` to the folder `name`, `record` last; another record there goes first."""
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        with self._failing(f"write {name}"):
            if self._fs.exists(self._path(name, record)):
                self._fs.rm_file(self._path(name, record))
            for file in sorted(files, key=lambda file: (file == record, file)):
                target = self._path(name, file)
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._fs.put_file(str(folder / file), target)

    def get(self, name: str, folder: Path, files: Iterator[str] | list[str]) -> None:
        """Copy these files of the folder `name` into `folder`. Raises DiffcError for a name that leads out of it."""
        for file in files:
            try:
                target = contained(folder, file)
            except PassError as error:
                raise of_pass_error(error, AGAIN) from error
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._failing(f"read {file} of {name}"):
                self._fs.get_file(self._path(name, file), str(target))

    def _path(self, *parts: str) -> str:
        return "/".join((str(self._root).rstrip("/"), *parts))

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Whatever a store's library raises becomes one message: each has its own exceptions."""
        try:
            yield
        except DiffcError:
            raise
        except Exception as error:
            raise DiffcError(
                f"cannot {what} in the store {self.url}: {type(error).__name__}: {error}",
                fix="check the address, your rights there and the network, and run the sweep again",
            ) from error


def stored_manifest(store: Store, name: str) -> Mapping[str, Any] | None:
    """The manifest of the artifact `name`, whose files all have their sizes; None where it is not there, or not whole.

    Raises DiffcError when the manifest is damaged.
    """
    text = store.record(name, MANIFEST)
    if text is None:
        return None
    manifest = parse_record(text, f"{store.address(name)}/{MANIFEST}", Manifest, fix=AGAIN)
    check_schema(Path(store.address(name)) / MANIFEST, manifest.get("schema"))
    sizes = store.sizes(name)
    whole = all(sizes.get(file) == entry["bytes"] for file, entry in manifest["files"].items())
    return manifest if whole else None


def fetch_artifact(store: Store, name: str, folder: Path) -> Artifact:
    """The artifact `name` as a local one in `folder`, its hashes verified. Raises DiffcError."""
    manifest = stored_manifest(store, name)
    if manifest is None:
        raise DiffcError(f"{store.address(name)} has no whole artifact", fix="run the sweep again")
    shutil.rmtree(folder, ignore_errors=True)
    store.get(name, folder, [*manifest["files"], MANIFEST])
    artifact = Artifact.load(folder)
    artifact.verify()
    return artifact


class SharedCalibrations:
    """Calibrations in a store, as `diffc.compile.shared.Calibrations` says."""

    def __init__(self, store: Store) -> None:
        self._store, self._seen = store, set[str]()

    @property
    def address(self) -> str:
        """The address of the store that they lie in."""
        return self._store.url

    def lend(self, key: str, folder: Path) -> bool:
        """Put the checkpoint of `key` into `folder`; False where there is none, or one that is damaged."""
        name = f"{_CALIBRATIONS}/{key}"
        if self._store.record(name, RECORD) is None:
            return False
        self._store.get(name, folder, list(self._store.sizes(name)))
        try:
            Checkpoint.load(folder)
        except DiffcError:
            shutil.rmtree(folder)
            return False
        return True

    def keep(self, key: str, folder: Path) -> None:
        """Remember the checkpoint in `folder`."""
        name = f"{_CALIBRATIONS}/{key}"
        if self._store.record(name, RECORD) is None:
            self._store.put(folder, name, RECORD)

    def known(self, key: str) -> bool:
        """Whether there is one of this key."""
        if key not in self._seen and self._store.record(f"{_CALIBRATIONS}/{key}", RECORD) is not None:
            self._seen.add(key)
        return key in self._seen
