"""`diffc doctor`: what works on this machine, why the rest does not, and the command that fixes it.

Each check imports what a user would run, in a process of its own where native code could take this one down.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FunctionType

import psutil

from diffc.backends.install import COMPILE, CUDA_TORCH, install_command, requirements
from diffc.backends.probes import DRIVER, Probe
from diffc.backends.sm import KNOWN_SMS
from diffc.backends.target import TARGETS, Target
from diffc.commands.doctor_run.machine import gpus
from diffc.errors import DiffcError
from diffc.models.registry import FAMILIES
from diffc.models.sources.locate import READERS
from diffc.plugins import broken, load
from diffc.progress import Reporter, Silent
from diffc.quantize.formats import FORMATS
from passes.base import all_passes, broken_plugins
from passes.plugins import named, package_of

_TIMEOUT = 120


@dataclass(frozen=True)
class Finding:
    """One line of the report: whether it works, or why not, and what fixes it (empty when there is nothing to do).

    `needed`: without it nothing can be compiled.
    """

    what: str
    works: bool
    detail: str
    fix: str = ""
    needed: bool = False


def examine(ui: Reporter | None = None) -> list[Finding]:
    """Every check, in the order in which the answers build on each other."""
    ui = ui or Silent()
    found = []
    for title, check in (
        ("look at the libraries", _libraries),
        ("look for a GPU", _gpus),
        ("try torch", _torch),
        ("try every target", _targets),
        ("look at plugins", _plugins),
        ("look for room", _room),
    ):
        with ui.stage(title):
            found += list(check())
    return found


def _plugins() -> Iterator[Finding]:
    """What installed packages add to diffc, and what of it cannot be used."""
    known: dict[str, Collection[str]] = {
        "diffc.families": FAMILIES,
        "diffc.formats": FORMATS,
        "diffc.targets": TARGETS,
        "diffc.readers": [reader.name for reader in READERS],
        "diffc.commands": load("diffc.commands", FunctionType),
        "passes": all_passes(),
    }
    faults = {(fault.group, fault.name): fault for fault in (*broken(), *broken_plugins())}
    for group, names in known.items():
        for name, points in named(group).items():
            what = f"plugin {name} of {' and '.join(map(package_of, points))}"
            if fault := faults.get((group, name)):
                yield Finding(what, False, fault.reason, "update or uninstall the package; all else works")
            elif name in names:
                yield Finding(what, True, f"adds to {group}")


def require_able(findings: Sequence[Finding]) -> None:
    """Raise DiffcError with the first thing whose lack keeps every compile from running."""
    for finding in findings:
        if finding.needed and not finding.works:
            raise DiffcError(
                f"nothing can be compiled here: {finding.what} {finding.detail}", fix=finding.fix
            )


def _libraries() -> Iterator[Finding]:
    """Each requirement of diffc against the version that is installed."""
    for requirement in (*requirements(), *requirements(COMPILE)):
        version = _version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if version is None:
            yield Finding(requirement.name, False, "is not installed", f'pip install "{wanted}"', needed=True)
        elif not requirement.specifier.contains(version, prereleases=True):
            detail = f"{version}, and diffc is tested with {requirement.specifier}"
            yield Finding(requirement.name, False, detail, f'pip install "{wanted}"')
        else:
            yield Finding(requirement.name, True, version)
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        yield Finding(
            "one ONNX Runtime",
            False,
            "onnxruntime and onnxruntime-gpu unpack into the same folder",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them",
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> Iterator[Finding]:
    """The driver, and of each GPU its --sm and the formats that it has."""
    driver, found = gpus()
    if not driver:
        yield Finding("NVIDIA driver", False, "is not installed: compiles for a GPU elsewhere still work")
        return
    new = int(driver.partition(".")[0]) >= DRIVER
    detail = driver if new else f"{driver}; targets with CUDA 13 need {DRIVER} or newer"
    yield Finding("NVIDIA driver", new, detail, "" if new else "install a newer driver from nvidia.com")
    for each in found:
        yield gpu(each["name"], each["sm"], each["memory"])


def gpu(name: str, sm: int, memory: int) -> Finding:
    """What a compile should be given for a GPU of compute capability `sm` with `memory` bytes."""
    formats = ", ".join(fmt.name for fmt in FORMATS.values() if fmt.min_sm <= sm)
    what = f"{name}, SM{sm}, {memory / 1e9:.0f} GB"
    if sm not in KNOWN_SMS:
        known = ", ".join(map(str, KNOWN_SMS))
        why = f"{what}: TensorRT-RTX builds for SM {known}; formats here: {formats}"
        return Finding("GPU", False, why, "use --target ort-cuda or --target tensorrt")
    return Finding("GPU", True, f"{what}: --sm {sm}, formats {formats}")


def _torch() -> Iterator[Finding]:
    code, text = _run(
        "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    )
    if code:
        wanted = next((f"{r.name}{r.specifier}" for r in requirements() if r.name == "torch"), "torch")
        yield Finding("torch on a GPU", False, _last(text), f'pip install --force-reinstall "{wanted}"')
    elif text.strip():
        yield Finding("torch on a GPU", True, text.strip())
    else:
        why = "torch sees no CUDA device: calibration runs on the CPU, in float32"
        has_gpu = bool(gpus()[0])
        yield Finding("torch on a GPU", False, why, CUDA_TORCH if has_gpu else "")


def _targets() -> Iterator[Finding]:
    for target in TARGETS.values():
        if target.probe is not None:
            yield _target(target, target.probe)


def _target(target: Target, probe: Probe) -> Finding:
    """Whether a target works here, by its own probe."""
    what, install = f"target {target.name}", install_command(target.extra)
    if importlib.util.find_spec(target.module) is None:
        return Finding(what, False, f"{target.module} is not installed", install, target.needed)
    if probe.package and importlib.util.find_spec(probe.package) is None:
        why = "the provider's package is not installed; models for it compile all the same"
        return Finding(what, False, why, probe.install)
    status, text = _run(probe.code)
    if status:
        return Finding(what, False, _last(text), probe.fix.format(install=install), target.needed)
    return Finding(what, True, text.strip(), needed=target.needed)


def _room() -> Iterator[Finding]:
    free = psutil.virtual_memory().available / 1e9
    detail = f"{free:.0f} GB free; validation takes 16 bytes a parameter"
    yield Finding("memory", free > 4, detail, "close other programs")
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding("disk", disk > 5, f"{disk:.0f} GB free here", "free some space")


def _run(code: str) -> tuple[int, str]:
    """Run `code` in a Python of its own: its exit status, and what it wrote."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {_TIMEOUT} s"
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr + done.stdout


def _last(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word (a crash of native code)"
