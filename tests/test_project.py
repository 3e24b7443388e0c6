"""pyproject.toml: what is imported is declared, and what is declared exists."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ELSEWHERE = {"onnxruntime_ep_nv_tensorrt_rtx", "optimum", "comfy", "folder_paths", "gguf", "comfy_kitchen"}
"""What tools/optimum and tools/prove/library_files.py import in environments of their own, and the node of ComfyUI."""
BROUGHT = {
    "tensorrt_rtx": "tensorrt-rtx",
    "tensorrt": "tensorrt-cu13",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "pyarrow": "pyarrow",
    "mkdocs": "mkdocs",
    "playwright": "playwright",
}
"""Modules of extras that a test run does not install, or that another package brings -> what is declared for them."""


def name_of(requirement: str) -> str:
    for mark in "=<>!~[; ":
        requirement = requirement.partition(mark)[0]
    return requirement.lower().replace("_", "-")


def imported(package: str) -> set[str]:
    """The modules of others that the files of a package import."""
    found: set[str] = set()
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {item.name.partition(".")[0] for item in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"diffc", "passes", "tools", "tests"}


@pytest.mark.parametrize("package", ["diffc", "passes", "tools", "tests"])
def test_what_is_imported_is_declared(package: str) -> None:
    declared = {
        name_of(line) for line in (*PROJECT["dependencies"], *(r for e in EXTRAS.values() for r in e))
    }
    packages = packages_distributions()
    for module in imported(package) - ELSEWHERE:
        known = {name_of(name) for name in [BROUGHT.get(module, ""), *packages.get(module, [])]}
        assert known & declared, f"{package} imports {module}, which no dependency of pyproject.toml brings"


def test_passes_needs_little() -> None:
    assert imported("passes") == {"onnx", "onnx_graphsurgeon", "numpy", "ml_dtypes"}


def test_commands_of_the_project_exist() -> None:
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert importlib.util.find_spec(module)
        assert callable(getattr(importlib.import_module(module), function))


def test_the_two_onnx_runtimes_never_come_together() -> None:
    wheels = {
        extra: [n for n in map(name_of, lines) if n.startswith("onnxruntime")]
        for extra, lines in EXTRAS.items()
    }
    assert {extra: found for extra, found in wheels.items() if found} == {
        "cpu": ["onnxruntime"],
        "gpu": ["onnxruntime-gpu"],
        "runtime": ["onnxruntime"],
        "runtime-torch": ["onnxruntime"],
        "runtime-rtx": ["onnxruntime"],
    }


def test_what_runs_an_artifact_is_without_what_compiles() -> None:
    heavy = {"torch", "diffusers", "transformers", "nvidia-modelopt", "accelerate", "onnxscript"}
    assert not heavy & {name_of(line) for line in (*PROJECT["dependencies"], *EXTRAS["runtime"])}
    assert heavy <= {name_of(line) for line in EXTRAS["compile"]}
    for extra in ("cpu", "gpu", "rtx", "trt"):
        assert "diffc[compile]" in EXTRAS[extra], "README's commands install one of these"
    pins = {re.sub(r"\[.*\]", "", line) for lines in EXTRAS.values() for line in lines}
    assert len({name_of(pin) for pin in pins}) == len(pins), "one pin for each package"
