"""The one writer that computes weights and streams them to disk, in bounded memory and resumable after a kill.

Where each tensor lies is known before any is computed (`passes.weights.layout`). Tasks compute parts of tensors on all
cores; this thread hashes and writes them in order, and the disk is kept at work meanwhile (`passes.weights.flush`).
Files appear under their final names only when complete.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

import onnx

from passes.base import PassError
from passes.files.atomic import check_own, drop, irregular, open_own, replace
from passes.weights.evaluate import THREADS, Task, tasks, to_bytes
from passes.weights.flush import Flusher
from passes.weights.initializers import initializers
from passes.weights.journal import Journal
from passes.weights.layout import Place, identity_of, lay_out, resolve, total_size
from passes.weights.recipe import Recipe

_AHEAD = 2
"""Tasks per thread that may be finished before they are written."""

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the tensor just written."""


@dataclass(frozen=True)
class SavedFile:
    """A file as it was written: path, size in bytes and SHA-256."""

    path: Path
    nbytes: int
    sha256: str


Part = tuple[Place, memoryview, bool]
"""The next bytes of a place, and whether they are its last."""


def save(
    model: onnx.ModelProto, path: str | os.PathLike[str], progress: Progress | None = None
) -> list[SavedFile]:
    """Write `path` and, for weights over 1 KiB, `path` + "_data".

    Equal recipes are stored once. Raises PassError when the disk has no room; then nothing is left on the disk. After a
    kill, the same call goes on where the killed one was.
    """
    return save_all({Path(path): model}, progress)


def save_all(
    models: Mapping[Path, onnx.ModelProto], progress: Progress | None = None, journal: Path | None = None
) -> list[SavedFile]:
    """Write several models of one folder that share one file of weights: that of the first, + "_data".

    With `journal`, the journal is there and stays: a later call verifies the file and computes nothing.
    """
    first = next(iter(models))
    data = first.with_name(first.name + "_data")
    if not first.parent.is_dir():
        raise PassError(f"no such folder: {first.parent}. Fix: make it, or name another output")
    for final in (*models, data):
        if kind := irregular(final):
            raise PassError(f"{final} is {kind}, not a file: it is left as it is. Fix: name another output")
    _check_sources([*models, data], models.values())
    copies = {path: _copy(model) for path, model in models.items()}
    places = lay_out(copies.values())
    notes = Journal(journal or _beside(data, ".journal"), identity_of(places))
    partial = {final: _beside(final, ".partial") for final in (*copies, data)}
    try:
        weights = _stream(places, partial[data], data, notes, progress)
        for model in copies.values():
            resolve(model, places, data.name)
        saved = {path: _write(partial[path], model) for path, model in copies.items()}
        saved |= {data: weights} if weights else {}
        if weights and data.is_file():  # an older model never stands beside weights that are not its own
            for final in models:
                final.unlink(missing_ok=True)
        for final, written in reversed(saved.items()):  # what names the data comes last
            replace(written.path, final)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PassError(
                f"no space left on {first.parent}: {_size(total_size(places))} are needed."
                f" Fix: {_more_room(first.parent)}"
            ) from error
        raise
    finally:
        for file in partial.values():
            drop(file)
        if journal is None:
            drop(notes.path)
    return [SavedFile(final, f.nbytes, f.sha256) for final, f in saved.items()]


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + (1 << 20):
        raise PassError(
            f"no room on {folder}: {_size(needed)} are needed, {_size(free)} are free."
            f" Fix: {_more_room(folder)}"
        )


def _more_room(folder: Path) -> str:
    """What to do where a folder has no room; one of temporary files is nobody's output."""
    temporary = Path(tempfile.gettempdir())
    if folder.parent == temporary and folder.name.startswith("diffc-"):
        return f"free some space in {temporary}, or set TMPDIR (Windows: TEMP) to a folder that has room"
    return "free some space, or name another output"


def _check_sources(finals: Iterable[Path], models: Iterable[onnx.ModelProto]) -> None:
    """Raise PassError when a file that is to be written holds weights of what is to be written."""
    recipes = (Recipe.of_tensor(tensor) for model in models for tensor in initializers(model))
    paths = {
        source.path for recipe in recipes if recipe is not None for source in recipe.sources if source.path
    }
    read = {Path(path).resolve() for path in paths}
    for final in finals:
        if final.resolve() in read:
            raise PassError(
                f"{final} holds weights of the model that is to be written. Fix: name another output"
            )


def _size(count: float) -> str:
    """Bytes as people say them: 3.1 GB, 12 kB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _stream(
    places: Mapping[str, Place], partial: Path, final: Path, notes: Journal, progress: Progress | None
) -> SavedFile | None:
    """Compute every place into `partial`; what an earlier process put there or into `final` is taken over."""
    if not places:
        return None
    total = total_size(places)
    if notes.matches() and final.is_file() and not final.is_symlink() and not check_own(partial):
        final.replace(partial)  # killed after the file got its name, but before all was done
    _check_room(final.parent, total - (partial.stat().st_size if check_own(partial) else 0))
    open_own(partial).close()  # before the journal: one without this file means that it has its final name
    length, digest = notes.begin(partial, {place.end for place in places.values()})
    left = [place for place in places.values() if place.end > length and not place.inside]
    with (
        open_own(partial) as file,
        ThreadPoolExecutor(1) as hand,
        Flusher(file.fileno()) as disk,
        _Ahead(left) as parts,
    ):
        file.truncate(length)
        file.seek(length)
        for place, part, last in parts:
            chunk = bytes(max(0, place.offset - length))
            for data in (memoryview(chunk), part) if chunk else (part,):
                written = hand.submit(_write_all, file, data)
                digest.update(data)
                written.result()
                length += len(data)
            disk.grown(length)
            if last:
                notes.record(length, digest, force=length == total)
            if progress:
                progress(length, total, place.name)
        disk.finish()
    return SavedFile(partial, length, digest.hexdigest())


class _Ahead(Iterator[Part]):
    """Yields (place, bytes, is_last) in the order of the file.

    A thread of its own makes the tasks, and a pool runs them, some ahead of whoever asks for them: so hashing and
    writing go on while the next weight is prepared, which transposing one whole is.
    """

    def __init__(self, places: Iterable[Place]):
        self._places, self._stopped = places, threading.Event()
        self._queue: Queue[tuple[Place, Future[memoryview], bool] | BaseException | None] = Queue(
            _AHEAD * THREADS
        )
        self._pool = ThreadPoolExecutor(THREADS)
        self._thread = threading.Thread(target=self._submit, daemon=True)

    def __enter__(self) -> _Ahead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        while self._thread.is_alive():  # it may wait for room in the queue
            with suppress(Empty):
                self._queue.get(timeout=0.01)
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def __next__(self) -> Part:
        item = self._queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        place, future, last = item
        return place, future.result(), last

    def _submit(self) -> None:
        try:
            for place in self._places:
                for task, last in _marked(tasks(place.recipe)):
                    self._queue.put((place, self._pool.submit(_bytes, task), last))
                    if self._stopped.is_set():
                        return
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)


def _marked(parts: Iterator[Task]) -> Iterator[tuple[Task, bool]]:
    """Each task with whether it is the last."""
    held = next(parts)
    for task in parts:
        yield held, False
        held = task
    yield held, True


def _bytes(task: Task) -> memoryview:
    return to_bytes(task())


def _write_all(file: io.RawIOBase, data: memoryview) -> None:
    while len(data):  # a raw file writes 2 GB at most at a time
        data = data[file.write(data) or 0 :]


def _write(partial: Path, model: onnx.ModelProto) -> SavedFile:
    data = model.SerializeToString(deterministic=True)
    with open_own(partial, new=True) as file:
        _write_all(file, memoryview(data))
        os.fsync(file.fileno())
    return SavedFile(partial, len(data), hashlib.sha256(data).hexdigest())
