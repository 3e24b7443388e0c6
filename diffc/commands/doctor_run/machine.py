"""What a report says of the machine: system, driver, GPUs, and the versions that results depend on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from typing import Any

import psutil

from diffc.artifact.describe import described_versions

GPUS = """
import json, pynvml as n
n.nvmlInit()
text = lambda x: x.decode() if isinstance(x, bytes) else x
handles = [n.nvmlDeviceGetHandleByIndex(i) for i in range(n.nvmlDeviceGetCount())]
print(json.dumps({"driver": text(n.nvmlSystemGetDriverVersion()), "gpus": [
    [text(n.nvmlDeviceGetName(h)), *n.nvmlDeviceGetCudaComputeCapability(h), n.nvmlDeviceGetMemoryInfo(h).total]
    for h in handles]}))
"""
"""Prints the driver's version and each GPU's name, compute capability and memory; fails where there is no driver."""
_TIMEOUT = 120


def gpus() -> tuple[str, list[dict[str, Any]]]:
    """The driver's version, empty without one, and each GPU: name, sm and memory (bytes), in the driver's order."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", GPUS], capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return "", []
    if done.returncode:
        return "", []
    found = json.loads(done.stdout)
    rows = [
        {"name": name, "sm": 10 * major + minor, "memory": memory}
        for name, major, minor, memory in found["gpus"]
    ]
    return str(found["driver"]), rows


def machine() -> dict[str, Any]:
    """Everything that a report tells of this machine; no name of it or of its user."""
    driver, found = gpus()
    names = ("onnxruntime", "tensorrt", "nvidia", "torch", "cuda", "polygraphy", "numpy", "onnx", "diffusers")
    packages = {
        str(d.name): d.version
        for d in importlib.metadata.distributions()
        if d.name and d.name.lower().startswith(names)
    }
    return {
        **described_versions(),
        "system": f"{platform.system()} {platform.release()} {platform.version()} {platform.machine()}",
        "processor": platform.processor(),
        "cores": psutil.cpu_count(logical=False),
        "memory": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "packages": dict(sorted(packages.items())),
        "driver": driver,
        "gpus": found,
    }
