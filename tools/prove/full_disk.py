"""Runs commands on a full disk, gives it room, runs them again, and holds the result against an undisturbed one.

    python -m tools.prove.full_disk --kind lora --trials 6 --seed 1     (Linux, as root: it mounts a tmpfs)

A trial draws how many bytes of the result fit, and how: the disk is that small from the start, or somebody else fills
it when so much has been written. The command must end with exit code 1 and one message with a fix, and leave nothing
half under a final name. With room, the same command must end with the files of an undisturbed run, and nothing beside
them. `--temporary`: the system's temporary folder is what is full. Prints a line of JSON for each trial, and exits 1 on
any fault.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tools.prove.kill_kinds import KINDS, Kind, write_inputs
from tools.prove.kills import LONGEST, Trial

_ROOM = 1 << 28
_LEAST = 1 << 12
"""Bytes of the smallest disk, a page."""


def main() -> int:
    """Run the trials of one kind; 1 on any fault."""
    options = _options()
    (kind,) = (kind for kind in KINDS if kind.name == options.kind)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="full-disk-") as name:
        root, full = Path(name), f"{kind.name}-temporary" if options.temporary else kind.name
        write_inputs(root / "inputs")
        with _disk(root / full) as disk:
            trial = OnDisk(kind, root, draw, disk)
            found = {"kind": kind.name, "seconds": round(trial.seconds, 1), "bytes": trial.most}
            print(json.dumps(found), flush=True)
            for _ in range(options.trials):
                trial.fill()
    for fault in trial.faults:
        print(fault, file=sys.stderr)
    return 1 if trial.faults else 0


class OnDisk(Trial):
    """One kind of command whose output, or whose temporary folder, is on a small disk."""

    def __init__(self, kind: Kind, root: Path, draw: random.Random, disk: Path) -> None:
        super().__init__(kind, root, draw, fresh=False)
        self._disk = disk
        self.most = self._measured()

    def fill(self) -> None:
        """One trial."""
        self._clear()
        fits, how = self._draw.randint(_LEAST, self.most), self._draw.choice(("small", "fills"))
        line: dict[str, Any] = {"disk": self._disk.name, "fits": fits, "how": how}
        if how == "small":
            _resize(self._disk, fits)
        process = self._start()
        if how == "fills":
            self._fill_at(process, fits)
        code = self._end(process)
        line |= {"code": code, "said": self._message()}
        if code not in (0, 1) or (code == 1 and not _is_one_message(self._said())):
            self._fault(f"exit {code}: {self._said()}", line)
        self._look_while_unfinished(line)
        (self._disk / "filler").unlink(missing_ok=True)
        _resize(self._disk, _ROOM)
        self._look_at_the_end(self._end(self._start()), line)
        print(json.dumps(line), flush=True)

    def _measured(self) -> int:
        """The most bytes that the disk holds while the command runs."""
        self._clear()
        process, most = self._start(), 0
        while process.exitcode is None:
            most = max(most, _used(self._disk))
            process.join(0.005)
        return max(most, 2 * _LEAST)

    def _fill_at(self, process: Any, written: int) -> None:
        ended = time.monotonic() + LONGEST
        while process.exitcode is None and time.monotonic() < ended:
            if _used(self._disk) >= written:
                _fill(self._disk / "filler")
                return
            process.join(0.002)

    def _message(self) -> str:
        return self._said().partition("error:")[2].strip()[:300]


def _fill(path: Path) -> None:
    """Write until there is no room; the files of others grow meanwhile."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(_LEAST))


def _is_one_message(said: str) -> bool:
    return said.count("error:") == 1 and "Fix:" in said and "Traceback" not in said


def _used(folder: Path) -> int:
    return shutil.disk_usage(folder).used


@contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    """A file system of its own in memory."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_ROOM}", "none", str(folder)], check=False
    ).returncode:
        raise SystemExit("a tmpfs cannot be mounted. Fix: run as root on Linux")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _resize(folder: Path, size: int) -> None:
    size = max(_LEAST, _used(folder), size)
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", default="lora", choices=[kind.name for kind in KINDS])
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--temporary", action="store_true", help="fill the temporary folder, not that of the output"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
