"""Makes and tests the environment of optimum-onnx's pipelines; needs Python 3.11 or newer and nothing else.

    python tools/optimum/env.py make [--rtx] [--folder DIR]    DIR is .venv-optimum beside this project by default
    python tools/optimum/env.py test [--folder DIR]

optimum-onnx 0.1.0 needs transformers 4 and an older diffusers, so that it cannot live beside diffc. `make` installs
the versions of tools/optimum/constraints.txt, and with --rtx the TensorRT-RTX provider of ONNX Runtime. `test` says
whether every pipeline imports there with exactly those versions. Images come from tools/optimum/images.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
# One ONNX Runtime only: optimum-onnx without its extra brings none, and two would unpack into one folder.
PACKAGES = ("optimum-onnx", "diffusers", "transformers", "torch", "onnxruntime", "sentencepiece", "protobuf")
RTX = "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0"
# Linux wheels of torch carry gigabytes of CUDA, which nothing here uses; macOS and Windows have the CPU build as it is.
CPU_TORCH = "https://download.pytorch.org/whl/cpu"

PROBE = """
import sys
from importlib.metadata import version
from optimum.onnxruntime import ORTFluxPipeline, ORTStableDiffusion3Pipeline, ORTStableDiffusionXLPipeline
import onnxruntime

wrong = []
for line in open(sys.argv[1], encoding="utf-8"):
    name, equals, wanted = line.strip().partition("==")
    if not equals or name.startswith("#"):
        continue
    try:
        found = version(name).partition("+")[0]
    except Exception:
        found = "not installed"
    if found != wanted:
        wrong.append(f"{name} is {found}, not {wanted}")
print("\\n".join(wrong) or "The three pipelines import; ONNX Runtime has " + ", ".join(
    onnxruntime.get_available_providers()))
sys.exit(bool(wrong))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; its exit code."""
    given = parser().parse_args(arguments)
    if given.what == "test":
        return probe(given.folder)
    return make(given.folder, rtx=given.rtx)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=("make", "test"))
    made.add_argument("--folder", type=Path, default=ROOT / ".venv-optimum")
    made.add_argument("--rtx", action="store_true", help="install the TensorRT-RTX provider too")
    return made


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install_command(folder: Path, *, rtx: bool) -> list[str]:
    """The pip call that fills the environment."""
    command = [str(python_of(folder)), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["-c", str(CONSTRAINTS), *PACKAGES, *([RTX] if rtx else [])]
    # A pip of the user's that is set to an index of his own decides where torch comes from.
    if sys.platform == "linux" and not _has_own_index():
        command += ["--extra-index-url", CPU_TORCH]
    return command


def make(folder: Path, *, rtx: bool) -> int:
    """Make the environment, or bring one up to date, then test it."""
    if not python_of(folder).exists():
        print(f"Making {folder}", flush=True)
        venv.create(folder, with_pip=True)
    if code := subprocess.call(install_command(folder, rtx=rtx)):
        print("pip could not install the pipelines; its messages are above")
        return code
    return probe(folder)


def probe(folder: Path) -> int:
    """Import the pipelines in the environment and hold its versions against the constraints."""
    python = python_of(folder)
    if not python.exists():
        print(f"There is no environment in {folder}; make it: python tools/optimum/env.py make")
        return 1
    code = subprocess.call([str(python), "-W", "ignore", "-c", PROBE, str(CONSTRAINTS)])
    print(f"{python} {'is ready' if code == 0 else 'is not what the constraints say'}")
    return code


def _has_own_index() -> bool:
    """Whether pip is told, by its configuration, where packages are."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    return "index-url" in listed or "find-links" in listed


if __name__ == "__main__":
    sys.exit(main())
