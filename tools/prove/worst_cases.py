"""What the worst file of a few kilobytes costs at each door, through the whole command in a new process.

    python -m tools.prove.worst_cases [--only NAME]      (Linux and macOS)

Prints a row for each: the file, what is said, seconds of CPU and megabytes of the largest process, processes apart
included. Exits 1 when a command ends with a traceback, with another code than is expected, or after more than 60 s.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tools.prove.worst_files import CASES, Case

_LONGEST = 60.0


def main() -> int:
    """Measure every case; 1 on any fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="")
    only, faults = parser.parse_args().only, 0
    print("| file | bytes | what is said | CPU, s | memory, MB |\n|---|---|---|---|---|", flush=True)
    for case in CASES:
        if only in case.name:
            with tempfile.TemporaryDirectory(prefix="worst-") as folder:
                faults += _told(case, Path(folder))
    return 1 if faults else 0


def _told(case: Case, folder: Path) -> bool:
    """Print the row of a case; whether anything is wrong with it."""
    case.write(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    command = [sys.executable, "-m", "diffc", *(text.format(at=folder) for text in case.arguments)]
    with (folder / "said.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        ending = threading.Timer(_LONGEST, process.kill)
        ending.start()
        _, status, used = os.wait4(process.pid, 0)
        ending.cancel()
        log.seek(0)
        said = log.read()
    process.returncode = code = os.waitstatus_to_exitcode(status)
    peak = used.ru_maxrss / (1 << 10 if sys.platform == "linux" else 1 << 20)
    message = " ".join((said.partition("error:")[2] or said).partition("Fix:")[0].split())
    message = message.replace(str(folder), "").replace("|", "\\|")[:160]
    row = (case.name, size, message, f"{used.ru_utime + used.ru_stime:.1f}", f"{peak:.0f}")
    print("| " + " | ".join(map(str, row)) + " |", flush=True)
    wrong = code != case.code or "Traceback" in said
    if wrong:
        print(f"{case.name}: exit {code}, expected {case.code}\n{said[-2000:]}", file=sys.stderr)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
