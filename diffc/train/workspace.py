"""The folder of a training under way: beside the checkpoint, removed when that is written, taken up after a kill."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from diffc.errors import DiffcError
from diffc.locks import locked
from diffc.progress import Reporter
from diffc.train.request import TrainPlan
from passes.files.atomic import check_own_folder, write_text

_KEY = "request"


def place_of(output: Path) -> Path:
    """Where the training of a checkpoint works."""
    return output.with_name(f".{output.name}.training")


@contextmanager
def workspace(plan: TrainPlan, accelerator: Any, ui: Reporter) -> Iterator[Path]:
    """The folder of this training, with what an equal one has left; it goes when the block ends without an error.

    Of several processes, the first makes and removes it. Raises DiffcError where another training is writing it.
    """
    folder = place_of(plan.request.output)
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield folder
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder.with_name(folder.name + ".lock")))
        except Timeout as error:
            raise DiffcError(
                f"another training is writing {plan.request.output}", fix="wait for it, or name another -o"
            ) from error
        _take_up(folder, plan.key, ui)
        accelerator.wait_for_everyone()
        yield folder
        shutil.rmtree(folder)


def _take_up(folder: Path, key: str, ui: Reporter) -> None:
    """Keep what an equal training left; remove what another one did."""
    check_own_folder(folder)
    note = folder / _KEY
    if note.is_file() and note.read_text(encoding="utf-8") == key:
        ui.note(f"going on with a training that was stopped ({folder})")
        return
    if note.is_file():
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    write_text(note, key)
