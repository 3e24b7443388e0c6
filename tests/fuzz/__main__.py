"""`python -m tests.fuzz --long`: thousands of lies at every door, and a table of what became of them.

Prints one row for each door: cases, refused, accepted, errors that no user should see, the longest and the largest. A
lie that made such an error is written to the folder of --keep.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from diffc.memory import peak_rss
from tests.fuzz.doors import DOORS, Door, Place
from tests.fuzz.kept_doors import KEPT_DOORS

HANG = 60.0
"""Seconds after which a case is a hang: the process ends with the places of all threads."""


def run(door: Door, cases: int, start: int, keep: Path) -> Counter[str]:
    """Tell `cases` lies at a door. Counts, and in "slowest" and "memory" milliseconds and megabytes."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="diffc-fuzz-") as folder:
        place = Place(door, Path(folder))

        @seed(start)
        @settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(place.lies)
        def lies(lie: tuple[str, bytes]) -> None:
            faulthandler.dump_traceback_later(HANG, exit=True)
            begun = time.process_time()
            try:
                found["refused" if place.open(lie) else "accepted"] += 1
            except Exception as error:
                found["wrong"] += 1
                last = traceback.extract_tb(error.__traceback__)[-1]
                note(
                    keep,
                    door,
                    lie,
                    f"{type(error).__name__}: {error} ({last.filename}:{last.lineno} {last.name})",
                )
            found["slowest"] = max(found["slowest"], int(1000 * (time.process_time() - begun)))
            found["cases"] += 1

        before = peak_rss() or 0
        lies()
        faulthandler.cancel_dump_traceback_later()
        found["memory"] = ((peak_rss() or 0) - before) >> 20
    return found


def note(keep: Path, door: Door, lie: tuple[str, bytes], said: str) -> None:
    """Write a lie that made an error, and say so."""
    keep.mkdir(parents=True, exist_ok=True)
    name = f"{len(list(keep.iterdir()))}-{Path(lie[0]).name}"
    (keep / name).write_bytes(lie[1])
    print(f"{door.name}: {said[:400]}: {keep / name}", file=sys.stderr)


def main() -> int:
    """Run the doors that are asked for; 1 when an error came up that no user should see."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="10,000 cases in all, over all doors")
    parser.add_argument(
        "--cases", type=int, default=100, help="cases at a door; half where each starts a process"
    )
    parser.add_argument("--door", default="", help="doors whose name has this in it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-found"), help="folder for lies that made an error"
    )
    options = parser.parse_args()
    print("| door | cases | refused | accepted | wrong | slowest, ms of CPU | memory, MB more |")
    print("|---|---|---|---|---|---|---|")
    wrong = 0
    for door in (door for door in (*DOORS, *KEPT_DOORS) if options.door in door.name):
        cases = 820 if options.long else options.cases
        found = run(door, max(1, cases // 2) if door.apart else cases, options.seed, options.keep)
        wrong += found["wrong"]
        row = (found[key] for key in ("cases", "refused", "accepted", "wrong", "slowest", "memory"))
        print(f"| {door.name} | " + " | ".join(map(str, row)) + " |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
