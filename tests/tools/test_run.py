"""tools/run.py: the command that its demo starts is the command line."""

from __future__ import annotations

import subprocess
import sys

from diffc.version import VERSION
from tests import ROOT
from tools.run import DEMO, DIFFC, PAINT


def test_the_demo_starts_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, *DIFFC, "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"diffc {VERSION}\n"
    assert DEMO[: len(DIFFC)] == PAINT[: len(DIFFC)] == DIFFC
