"""A compile of several formats in one model: which they are, and where they run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffc.backends.sm import check_format_sms
from diffc.backends.target import Target
from diffc.errors import UsageError
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.formats import MIXED, find_format


def check_mixed(checkpoint: Path | None, targets: Sequence[Target], sms: Sequence[int]) -> None:
    """Raise UsageError without a mixed checkpoint, UnsupportedError when a target or GPU lacks a format in it."""
    if checkpoint is None:
        raise UsageError(
            f"format {MIXED.name!r} takes the calibration that `diffc mix` wrote",
            fix="run diffc mix MODEL --bits 5.5 -o DIR, and give --from-checkpoint DIR",
        )
    for name in Checkpoint.load(checkpoint).calibration.get("formats", []):
        fmt = find_format(name)
        check_format_sms(fmt.name, fmt.min_sm, sms)
        for target in targets:
            target.check_format(fmt.name)
