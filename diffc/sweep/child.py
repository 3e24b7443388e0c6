"""The process that does a job: `python -m diffc.sweep.child ROWS`, the pickled job on standard input.

It appends a line to ROWS as soon as a cell is finished. The job comes from the worker that has started this process. It
ends itself when that worker is gone, with all that it has started.
"""

from __future__ import annotations

import logging
import os
import pickle
import struct
import sys
import threading
from pathlib import Path

from diffc.sweep.job import Job
from diffc.sweep.orphans import watch
from diffc.sweep.rows import line_of
from diffc.sweep.work import work


def main(arguments: list[str]) -> int:
    """Do the job of standard input; 0 when every cell of it has a row."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("diffc.progress").setLevel(logging.INFO)
    length = struct.unpack(">Q", sys.stdin.buffer.read(8))[0]
    job: Job = pickle.loads(sys.stdin.buffer.read(length))
    threading.Thread(target=watch, daemon=True).start()
    with Path(arguments[0]).open("a", encoding="utf-8") as file:
        for row in work(job):
            file.write(line_of(row))
            file.flush()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # the watching thread waits for standard input, and would hold the end up
