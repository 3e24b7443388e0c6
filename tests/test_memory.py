"""The most memory that this process has held."""

from __future__ import annotations

import subprocess
import sys

from diffc.memory import peak_rss

GROWS = (
    "from diffc.memory import peak_rss; a = peak_rss(); b = bytearray(96 << 20); del b; print(a, peak_rss())"
)


def test_it_grows_with_what_was_held_and_never_shrinks() -> None:
    done = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 90 << 20 < after - before < 120 << 20
    mine = peak_rss()
    assert mine is not None
    assert mine > 10 << 20
