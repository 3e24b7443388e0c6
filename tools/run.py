"""Sets up an environment of its own in .venv and runs one of five things; needs Python 3.11 and nothing else.

    python tools/run.py demo           compile a small trained SD3 pipeline to FP8, and paint with it beside torch
    python tools/run.py test           lint, type check and all tests
    python tools/run.py test --fast    lint, type check, and the tests that compile no backbone
    python tools/run.py test --slow    lint, type check, and the tests that the gate leaves out: about an hour
    python tools/run.py docs           the documentation site, in build/site; every link in it is checked

The environment is made on the first call and brought up to date when pyproject.toml or the constraints change.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
INPUTS = (ROOT / "pyproject.toml", CONSTRAINTS)
OUTPUT = ROOT / "build" / "digits-sd3-fp8"
PICTURE = ROOT / "build" / "seven.png"

DIFFC = ["-m", "diffc"]
DEMO = [
    *(*DIFFC, "compile", "digits-sd3", "--format", "fp8", "--target", "trt-rtx", "--target", "ort"),
    *("--sm", "89", "--sm", "120", "--output", str(OUTPUT), "--force"),
]
PAINT = [
    *(*DIFFC, "generate", str(OUTPUT), "--prompt", "a handwritten seven", "--compare", "torch"),
    *("--target", "ort", "--batch", "3", "--output", str(PICTURE)),
]
EXTRAS = {"demo": "cpu,rtx", "docs": "cpu,docs", "test": "cpu,rtx,docs,report,test"}
SITE = ["-m", "mkdocs", "build", "--strict"]
LINT = [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."]]
TYPES = ["-m", "mypy"]
WORKERS = max(2, min(4, os.cpu_count() or 1))
"""Processes that test. Each compiles what its tests need and takes up to 3 GB of memory."""
TESTS = [
    "-m",
    "pytest",
    "-n",
    str(WORKERS),
    "--dist",
    "loadgroup",
    "--no-loadscope-reorder",
    "--durations",
    "15",
]
WHOLE = "not slow and not gpu"
FAST = f"{WHOLE} and not compiles"
SLOW = "slow and not gpu"
LANES = {("test",): WHOLE, ("test", "--fast"): FAST, ("test", "--slow"): SLOW}


def main() -> int:
    """Run what the command line asks for; its exit code."""
    wanted = tuple(sys.argv[1:])
    if wanted not in (("demo",), ("docs",), *LANES):
        print(__doc__)
        return 2
    install(EXTRAS[wanted[0]])
    if wanted in LANES:
        return test(LANES[wanted])
    return demo() if wanted == ("demo",) else docs()


def demo() -> int:
    """Compile the trained pipeline and paint with it; the exit code."""
    code = call(DEMO) or call(PAINT)
    print(
        f"The compiled model, engines and their checks are in {OUTPUT}\n"
        f"Three sevens, painted by torch and by the compiled model: {PICTURE}"
        if code == 0
        else "The demo failed; the message is above."
    )
    return code


def docs() -> int:
    """Build the documentation site; the exit code. A link that leads nowhere fails."""
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")  # news of mkdocs-material about other programs
    code = call(SITE)
    print(f"The site: {ROOT / 'build' / 'site' / 'index.html'}" if code == 0 else "The site was not built.")
    return code


def test(marks: str) -> int:
    """Lint, then check the types beside the tests that `marks` selects; the exit code of what failed first."""
    started = time.monotonic()
    for command in LINT:
        if code := call(command):
            return failed(command, code)
    # mypy keeps one core busy for half a minute and the tests keep two: beside each other nothing waits.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        types = subprocess.Popen([str(PYTHON), *TYPES], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        tests = [*TESTS, "-m", marks]
        code = call(tests)
        types_code = types.wait()
        said.seek(0)
        print(f"== {' '.join(TYPES[1:])}\n{said.read()}", end="")
    if types_code or code:
        return failed(TYPES, types_code) if types_code else failed(tests, code)
    print(f"All checks and tests passed in {time.monotonic() - started:.0f} s. The environment is {VENV}")
    return 0


def failed(command: list[str], code: int) -> int:
    """Say which command failed; its exit code."""
    print(f"FAILED: {' '.join(command[1:])}")
    return code


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
    if call([*pip, "-e", f"{ROOT}[{extras}]"], quiet=True):
        sys.exit("pip could not install diffc; its messages are above")
    stamp.write_text(digest)


def call(arguments: list[str], *, quiet: bool = False) -> int:
    """Run the environment's Python in the project's folder, after saying so; its exit code."""
    if not quiet:
        print(f"== {' '.join(arguments[1:])}", flush=True)
    return subprocess.call([str(PYTHON), *arguments], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
