"""Where compiles find the calibrations of others, so that of equal ones one is made."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Calibrations(Protocol):
    """Finished calibrations by their keys (`diffc.compile.keys.calibration_key`)."""

    def lend(self, key: str, folder: Path) -> bool:
        """Put the checkpoint of that key into `folder`, which is not there yet; False where there is none."""
        ...

    def keep(self, key: str, folder: Path) -> None:
        """Remember the checkpoint in `folder`; one that is known already is left as it is."""
        ...
