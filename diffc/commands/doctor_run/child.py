"""Runs one case in a process of its own, and says how that ended: by itself, by an error, or by a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffc.commands.doctor_run.cases import Case, Sample

COMMAND = (sys.executable, "-P", "-m", "diffc.commands.doctor_run.worker")
"""-P: a file of the user's folder called onnx.py must not be imported."""
_LOG_LINES = 120
_WINDOWS = {
    0xC0000005: "access violation",
    0xC0000017: "not enough memory",
    0xC000001D: "illegal instruction",
    0xC0000094: "integer division by zero",
    0xC00000FD: "stack overflow",
    0xC0000135: "a DLL was not found",
    0xC0000409: "the program was stopped for damaged memory",
}
"""Exit codes with which Windows ends a process."""


@dataclass(frozen=True)
class Ran:
    """What became of the process: "done", "not run", "failed", "crashed" or "timed out", with the reason.

    `notes` are the worker's (see worker.py), `log` the end of what it and its libraries wrote. `outputs` has those of
    each sample.
    """

    status: str
    reason: str = ""
    notes: Sequence[dict[str, Any]] = ()
    log: Sequence[str] = ()
    outputs: Sequence[dict[str, npt.NDArray[Any]]] = field(default=(), repr=False)


def run_case(
    folder: Path, case: Case, samples: Sequence[Sample], work: Path, *, gpu: int, repeat: int, timeout: float
) -> Ran:
    """Run `case` of the artifact in `folder` at the samples; files of the process go to the folder `work`."""
    inputs = {f"{i}/{name}": array for i, s in enumerate(samples) for name, array in s.inputs.items()}
    np.savez(work / "inputs.npz", **inputs)  # type: ignore[arg-type]  # its stub has no arrays by name
    request = {
        "artifact": str(folder),
        "target": case.target,
        "number": case.number,
        "gpu": gpu,
        "inputs": str(work / "inputs.npz"),
        "samples": len(samples),
        "outputs": str(work / "outputs.npz"),
        "notes": str(work / "notes.jsonl"),
        "repeat": repeat,
    }
    (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
    code = _wait(work, timeout)
    notes = _notes(work / "notes.jsonl")
    log = (work / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    ran = _judged(code, notes, log)
    return (
        ran if ran.status != "done" else Ran("done", "", notes, log, _outputs(work / "outputs.npz", samples))
    )


def _wait(work: Path, timeout: float) -> int | None:
    """The exit code of the worker; None when it was ended for taking too long."""
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment["PYTHONIOENCODING"] = "utf-8"
    environment["PYTHONFAULTHANDLER"] = "1"
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as the driver counts GPUs
    with (work / "log.txt").open("wb") as log:
        command = [*COMMAND, str(work / "request.json")]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()
            process.wait()


def _judged(code: int | None, notes: Sequence[dict[str, Any]], log: Sequence[str]) -> Ran:
    last = notes[-1] if notes else {}
    doing = next((note["doing"] for note in reversed(notes) if "doing" in note), "start")
    if code is None:
        return Ran("timed out", f"it was ended while it was about to {doing}", notes, log)
    if "not_run" in last:
        return Ran("not run", last["not_run"], notes, log)
    if "error" in last:
        return Ran("failed", f"at {doing!r}: {last['error']}", notes, log)
    if code or not last.get("done"):
        return Ran("crashed", f"its process ended at {doing!r}: {ended(code)}", notes, log)
    return Ran("done", "", notes, log)


def ended(code: int) -> str:
    """What an exit code says: the name of a signal, what Windows means by it, or the number."""
    if code < 0:
        try:
            return f"signal {signal.Signals(-code).name}"
        except ValueError:
            return f"signal {-code}"
    if code >= 0xC0000000:
        return f"exit code 0x{code:08X} ({_WINDOWS.get(code, 'an exception of Windows')})"
    return f"exit code {code}"


def _notes(path: Path) -> list[dict[str, Any]]:
    """The notes; a last line that a crash cut off is left out."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _outputs(path: Path, samples: Sequence[Sample]) -> list[dict[str, npt.NDArray[Any]]]:
    with np.load(path) as held:
        return [
            {name.partition("/")[2]: held[name] for name in held.files if name.startswith(f"{index}/")}
            for index in range(len(samples))
        ]
