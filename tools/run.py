"""Sets up an environment of its own in .venv and runs one of two things; needs Python 3.11 and nothing else.

    python tools/run.py demo    compile a small trained SD3 pipeline to FP8, and paint with it beside torch
    python tools/run.py test    lint, type check and test

The environment is made on the first call and brought up to date when pyproject.toml or the constraints change.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
INPUTS = (ROOT / "pyproject.toml", CONSTRAINTS)
OUTPUT = ROOT / "build" / "digits-sd3-fp8"
PICTURE = ROOT / "build" / "seven.png"

DEMO = [
    *(
        "-m",
        "diffc",
        "compile",
        "digits-sd3",
        "--format",
        "fp8",
        "--target",
        "trt-rtx",
        "--target",
        "ort",
    ),
    *("--sm", "89", "--sm", "120", "--output", str(OUTPUT), "--force"),
]
PAINT = [
    *(
        "-m",
        "diffc",
        "generate",
        str(OUTPUT),
        "--prompt",
        "a handwritten seven",
        "--compare",
        "torch",
    ),
    *("--target", "ort", "--batch", "3", "--output", str(PICTURE)),
]
TESTS = [
    ["-m", "ruff", "check", "."],
    ["-m", "ruff", "format", "--check", "."],
    ["-m", "mypy"],
    ["-m", "pytest", "-m", "not slow and not gpu", "-n", "2", "--dist", "loadfile", "--durations", "15"],
]


def main() -> int:
    """Run what the command line asks for; its exit code."""
    wanted = sys.argv[1:]
    if wanted not in (["demo"], ["test"]):
        print(__doc__)
        return 2
    install("cpu,rtx" if wanted == ["demo"] else "cpu,rtx,test")
    if wanted == ["demo"]:
        code = call(DEMO) or call(PAINT)
        print(
            f"The compiled model, engines and their checks are in {OUTPUT}\n"
            f"Three sevens, painted by torch and by the compiled model: {PICTURE}"
            if code == 0
            else "The demo failed; the message is above."
        )
        return code
    for command in TESTS:
        print(f"== {' '.join(command[1:])}", flush=True)
        if code := call(command):
            print(f"FAILED: {' '.join(command[1:])}")
            return code
    print(f"All checks and tests passed. The environment is {VENV}")
    return 0


def install(extras: str) -> None:
    """Bring .venv up to date with pyproject.toml; nothing is done when it is."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS)).hexdigest()
    stamp = VENV / f"diffc-{extras.replace(',', '-')}"
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == digest:
        return
    print(f"Installing diffc[{extras}] into {VENV}; the first time takes some minutes", flush=True)
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    if call([*pip, "-e", f"{ROOT}[{extras}]"]):
        sys.exit("pip could not install diffc; its messages are above")
    stamp.write_text(digest)


def call(arguments: list[str]) -> int:
    """Run the environment's Python in the project's folder; its exit code."""
    return subprocess.call([str(PYTHON), *arguments], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
