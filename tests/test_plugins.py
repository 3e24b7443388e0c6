"""A package that is installed for real adds a pass, a family, a format, a reader and a command to diffc.

The package is tests/plugin_package: each file is the smallest example of its kind, which CONTRIBUTING.md shows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from tests import ROOT

Diffc = Callable[..., subprocess.CompletedProcess[str]]


def installed(folder: Path, package: Path) -> None:
    """Install a package into `folder`, which PYTHONPATH can name, without a network."""
    source = shutil.copytree(package, folder.parent / f"{folder.name}-source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--target", str(folder), str(source)], check=True
    )


@pytest.fixture(scope="module")
def diffc(tmp_path_factory: pytest.TempPathFactory) -> Diffc:
    """Runs the command line in a process that has the plugin."""
    folder = tmp_path_factory.mktemp("plugins") / "site"
    installed(folder, ROOT / "tests" / "plugin_package")

    def run(*arguments: object, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(map(str, (*paths, folder, ROOT)))
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
        command = [sys.executable, "-m", "diffc", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """x -> Neg -> Neg -> Relu -> Neg -> Neg -> y."""
    ops = ("Neg", "Neg", "Relu", "Neg", "Neg")
    names = ["x", *(f"t{n}" for n in range(1, 5)), "y"]
    nodes = [onnx.helper.make_node(op, [names[n]], [names[n + 1]], f"n{n}") for n, op in enumerate(ops)]
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch"]) for n in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y])
    path = tmp_path / "in.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11), path
    )
    return path


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_a_pass_runs_in_opt_with_its_numbers_checked(diffc: Diffc, model: Path) -> None:
    output = model.with_name("out.onnx")
    done = diffc("opt", model, "-p", "cancel-negation,remove-unused", "--check", "numeric", "-o", output)
    assert done.returncode == 0, done.stderr
    assert ops(output) == ["Relu", "Neg", "Neg"]
    assert "its output is an output of the graph" in done.stdout
    assert "cancel-negation" in diffc("passes").stdout


def test_a_pass_runs_in_compile(diffc: Diffc, model: Path) -> None:
    output = model.with_name("artifact")
    done = diffc("compile", model, "--passes", "cancel-negation,remove-unused", "-o", output)
    assert done.returncode == 0, done.stderr
    assert ops(output / "model.onnx") == ["Relu", "Neg", "Neg"]
    refused = diffc("compile", model, "--passes", "cancel-sums", "-o", model.with_name("other"))
    assert refused.returncode in (1, 2)
    assert "unknown pass 'cancel-sums'" in refused.stderr
    assert "cancel-negation" in refused.stderr


@pytest.mark.compiles
def test_a_family_a_format_and_a_reader_compile_together(diffc: Diffc, tmp_path: Path) -> None:
    from diffusers import AuraFlowTransformer2DModel

    small = {
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
    }
    sizes = {
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "sample_size": 8,
        "pos_embed_max_size": 64,
    }
    AuraFlowTransformer2DModel(**small, **sizes).save_pretrained(tmp_path / "backbone")
    pointer = tmp_path / "mine.pointer"
    pointer.write_text(str(tmp_path / "backbone"), encoding="utf-8")
    done = diffc("compile", pointer, "--format", "int8_linear", "--calibrate", "synthetic", "--image-size", "64",
                 "-o", tmp_path / "artifact")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(auraflow) to int8_linear" in done.stderr
    assert "QuantizeLinear" in ops(tmp_path / "artifact" / "model.onnx")


def test_a_command_is_listed_and_runs(diffc: Diffc, model: Path) -> None:
    assert "Count the nodes of an ONNX file by operator" in diffc("--help").stdout
    done = diffc("count", model)
    assert (done.returncode, done.stdout) == (0, "Neg 4\nRelu 1\n")


def test_doctor_names_what_is_broken_and_nothing_else_breaks(diffc: Diffc) -> None:
    said = diffc("doctor").stdout
    row, fix = (text for text in said.splitlines() if "plugin broken of diffc-example 1.2.0" in text)
    assert " no " in row
    assert "update or uninstall the package" in fix
    assert "diffc_example.not_there:FORMAT cannot be imported: ModuleNotFoundError" in said
    assert "plugin cancel-negation of diffc-example 1.2.0" in said
    assert "int8_linear" in diffc("formats").stdout


def test_two_packages_with_one_name_are_both_named(diffc: Diffc, tmp_path: Path, model: Path) -> None:
    other = shutil.copytree(ROOT / "tests" / "plugin_package", tmp_path / "other")
    text = (other / "pyproject.toml").read_text(encoding="utf-8")
    text = text.replace('name = "diffc-example"', 'name = "diffc-other"').replace(
        "diffc_example", "diffc_other"
    )
    (other / "pyproject.toml").write_text(text, encoding="utf-8")
    (other / "diffc_example").rename(other / "diffc_other")
    installed(tmp_path / "site", other)
    done = diffc("opt", model, "-p", "cancel-negation", "-o", tmp_path / "o.onnx", paths=(tmp_path / "site",))
    assert done.returncode == 1
    assert "diffc-example 1.2.0 and diffc-other 1.2.0 both give this name" in done.stderr
    assert diffc("formats", paths=(tmp_path / "site",)).returncode == 0
