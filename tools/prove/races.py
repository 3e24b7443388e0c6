"""Three compiles that want one place, again and again, and three readers of it: nobody may see half of anything.

    python -m tools.prove.races --seconds 90

A compile that finds another one at work must say so in one message, exit code 1; any other must end with 0. Readers
load the artifact and hash all its files. Prints what was seen, and exits 1 on any fault.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from diffc.artifact.folder import MANIFEST, Artifact
from diffc.cli.main import run
from diffc.errors import DiffcError
from tools.prove.kill_kinds import KINDS, write_inputs

WRITERS = READERS = 3
REFUSED, REPLACED = "another diffc is writing", "was replaced while it was read"


def main() -> int:
    """Run writers and readers side by side; 1 on any fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="races-") as name:
        root = Path(name)
        write_inputs(root / "inputs")
        (root / "place").mkdir()
        kind = next(kind for kind in KINDS if kind.name == "lora")
        command = [*kind.command(root / "inputs", root / "place"), "--force"]
        assert run([*command, "-q"]) == 0  # there is something to read, and what follows is warm
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        found = context.Queue()
        work: list[tuple[Any, tuple[Any, ...]]]
        work = [(write, (command, root / f"said-{i}", seconds, i, found)) for i in range(WRITERS)]
        work += [(read, (root / "place" / kind.results[0], seconds, found)) for _ in range(READERS)]
        started = [context.Process(target=target, args=arguments) for target, arguments in work]
        for process in started:
            process.start()
        seen = [found.get() for _ in started]
        for process in started:
            process.join()
        left = sorted(path.name for path in (root / "place").iterdir())
        Artifact.load(root / "place" / kind.results[0]).verify()
    for counts in seen:
        print(json.dumps(counts))
    print(f"left in the folder of the output: {', '.join(left)}")
    return 1 if left != [kind.results[0]] or any(counts.get("faults") for counts in seen) else 0


def write(command: list[str], said: Path, seconds: float, seed: int, found: Any) -> None:
    """Compile until the time is over."""
    counts: Counter[str] = Counter()
    draw, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        with said.open("w", encoding="utf-8") as file:
            sys.stdout = sys.stderr = file
            code = run(command)
        text = said.read_text("utf-8")
        refused = code == 1 and text.count("error: ") == 1 and REFUSED in text
        counts["written" if code == 0 else "refused" if refused else "faults"] += 1
        time.sleep(draw.uniform(0, 2))
    found.put({"writer": os.getpid(), **counts})


def read(place: Path, seconds: float, found: Any) -> None:
    """Load and hash until the time is over."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            Artifact.load(place).verify()
            counts["read"] += 1
        except DiffcError as error:
            counts["replaced" if REPLACED in error.what else "faults"] += 1
        counts["faults"] += not (place / MANIFEST).is_file()
        time.sleep(0.05)
    found.put({"reader": os.getpid(), **counts})


if __name__ == "__main__":
    sys.exit(main())
