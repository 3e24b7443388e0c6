"""One of several processes that write, or read, one artifact again and again; what it saw is printed as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from diffc.artifact.folder import MANIFEST, Artifact, staging, write_manifest
from diffc.errors import DiffcError
from tests.artifact.manifests import described


def write(place: Path, seconds: float) -> dict[str, object]:
    """Replace the artifact for `seconds`; count those who are inside at once by a file of its own."""
    found: dict[str, object] = {"written": 0, "refused": 0, "together": 0}
    counts = dict.fromkeys(("written", "refused", "together"), 0)
    inside = place.with_name("inside")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with staging(place, force=True) as folder:
                try:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    counts["together"] += 1
                (folder / "model.onnx").write_bytes(os.urandom(2000))
                write_manifest(folder, described(targets={"ort": "model.onnx"}), {})
                inside.unlink(missing_ok=True)
            counts["written"] += 1
        except DiffcError as error:
            if "another diffc is writing" not in error.what:
                raise
            counts["refused"] += 1
    return found | counts


def read(place: Path, seconds: float) -> dict[str, object]:
    """Load and hash the artifact for `seconds`; it must be whole, and its name never without a manifest.

    One that is replaced between the two is told so.
    """
    counts = dict.fromkeys(("read", "bare", "replaced", "failed"), 0)
    said = ""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            Artifact.load(place).verify()
            counts["read"] += 1
        except DiffcError as error:
            replaced = "was replaced while it was read" in error.what
            counts["replaced" if replaced else "failed"] += 1
            said = said if replaced else str(error)
        counts["bare"] += place.is_dir() and not (place / MANIFEST).is_file() and place.is_dir()
    return {**counts, "said": said}


if __name__ == "__main__":
    work = {"write": write, "read": read}[sys.argv[1]]
    print(json.dumps(work(Path(sys.argv[2]), float(sys.argv[3]))))
