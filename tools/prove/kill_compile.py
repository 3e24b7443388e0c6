"""Kills a compile at random moments, finishes it, and holds the result against an undisturbed one, byte for byte.

    python -m tools.prove.kill_compile tiny-sd3 fp8 --kills 10 --seed 1 -- --steps 1 --image-size 64

What stands after `--` goes to every `diffc compile`. Prints one line of JSON for each kill and exits 1 on a difference.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffc.artifact.folder import RUN, file_sha256


def main() -> int:
    """Compile once undisturbed; then kill, finish and compare as often as asked for."""
    arguments = _arguments()
    random_moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        begin = time.monotonic()
        _compile(arguments, folder / "whole").wait()
        seconds = time.monotonic() - begin
        expected = _hashes(folder / "whole")
        failed = 0
        for index in range(arguments.kills):
            moment = random_moments.uniform(0, seconds)
            result = _killed(arguments, folder / "killed", moment, expected)
            line = {"kill": index, "after_s": round(moment, 2), "of_s": round(seconds, 2), **result}
            print(json.dumps(line), flush=True)
            failed += not result["equal"]
    return 1 if failed else 0


def _killed(
    arguments: argparse.Namespace, output: Path, moment: float, expected: dict[str, str]
) -> dict[str, object]:
    """Kill a compile after `moment` seconds, let another finish; what the first left, and whether all is equal."""
    first = _compile(arguments, output, "--force")
    time.sleep(moment)
    first.kill()
    first.wait()
    partial = output.with_name(f".{output.name}.partial")
    left = {p.name: p.stat().st_size for p in partial.rglob("*") if p.is_file()} if partial.exists() else {}
    begin = time.monotonic()
    code = _compile(arguments, output, "--force").wait()
    seconds = time.monotonic() - begin
    found = _hashes(output) if output.is_dir() else {}
    beside = [p.name for p in output.parent.iterdir() if p.name.startswith(".")]
    equal = code == 0 and found == expected and not beside
    differing = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    return {
        "left": left,
        "rerun_s": round(seconds, 2),
        "equal": equal,
        "differing": differing,
        "beside": beside,
    }


def _compile(arguments: argparse.Namespace, output: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [
        "-m",
        "diffc",
        "compile",
        arguments.model,
        "--format",
        arguments.format,
        "-o",
        str(output),
    ]
    return subprocess.Popen(
        [sys.executable, *command, *more, *arguments.options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its name in the folder, but for the one that has seconds in it."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: file_sha256(path) for name, path in files.items() if name != RUN}


def _arguments() -> argparse.Namespace:
    mine, options = sys.argv[1:], list[str]()
    if "--" in mine:
        mine, options = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("format")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where to write; the system's temporary folder by default"
    )
    parser.set_defaults(options=options)
    return parser.parse_args(mine)


if __name__ == "__main__":
    sys.exit(main())
