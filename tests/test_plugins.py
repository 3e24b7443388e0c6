"""A package that is installed for real adds a pass, a family, a format, a reader and a command to diffc.

The package is tests/plugin_package: each file is the smallest example of its kind, which CONTRIBUTING.md shows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from diffc import plugins
from diffc.backends.target import find_target
from diffc.errors import DiffcError, UnsupportedError, UsageError
from diffc.models.registry import family_of, find_family
from diffc.quantize.formats import find_format
from passes.plugins import Broken
from tests import ROOT

Command = Sequence[object]
Diffc = Callable[..., list[subprocess.CompletedProcess[str]]]
IN_TURN = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from diffc.cli.main import run
done = []
for command in json.load(sys.stdin):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = run(command)
    done.append((command, code, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""
"""Runs commands one after another: a process for each would import everything again."""


def installed(folder: Path, package: Path) -> None:
    """Install a package into `folder`, which PYTHONPATH can name, without a network."""
    source = shutil.copytree(package, folder.parent / f"{folder.name}-source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--target", str(folder), str(source)], check=True
    )


@pytest.fixture(scope="module")
def diffc(tmp_path_factory: pytest.TempPathFactory) -> Diffc:
    """Runs command lines, one after another, in a process that has the plugin."""
    folder = tmp_path_factory.mktemp("plugins") / "site"
    installed(folder, ROOT / "tests" / "plugin_package")

    def run(*commands: Command, paths: tuple[Path, ...] = ()) -> list[subprocess.CompletedProcess[str]]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, folder, ROOT)))}
        done = subprocess.run(
            [sys.executable, "-c", IN_TURN],
            input=json.dumps([[str(word) for word in command] for command in commands]),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [subprocess.CompletedProcess(*each) for each in json.loads(done.stdout)]

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
    command = ("opt", model, "-p", "cancel-negation,remove-unused", "--check", "numeric", "-o", output)
    done, passes = diffc(command, ["passes"])
    assert done.returncode == 0, done.stderr
    assert ops(output) == ["Relu", "Neg", "Neg"]
    assert "its output is an output of the graph" in done.stdout
    assert "cancel-negation" in passes.stdout


def test_a_pass_runs_in_compile(diffc: Diffc, model: Path) -> None:
    output = model.with_name("artifact")
    done, refused = diffc(
        ("compile", model, "--passes", "cancel-negation,remove-unused", "-o", output),
        ("compile", model, "--passes", "cancel-sums", "-o", model.with_name("other")),
    )
    assert done.returncode == 0, done.stderr
    assert ops(output / "model.onnx") == ["Relu", "Neg", "Neg"]
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
    command = (
        "compile",
        pointer,
        "--format",
        "int8_linear",
        "--calibrate",
        "synthetic",
        "--image-size",
        "64",
    )
    (done,) = diffc((*command, "-o", tmp_path / "artifact"))
    assert done.returncode == 0, done.stderr
    assert "(auraflow) to int8_linear" in done.stderr
    assert "QuantizeLinear" in ops(tmp_path / "artifact" / "model.onnx")


def test_a_command_is_listed_and_runs(diffc: Diffc, model: Path) -> None:
    shown, done = diffc(["--help"], ("count", model))
    assert "Count the nodes of an ONNX file by operator" in shown.stdout
    assert (done.returncode, done.stdout) == (0, "Neg 4\nRelu 1\n")


def test_doctor_names_what_is_broken_and_nothing_else_breaks(diffc: Diffc) -> None:
    said, formats = (done.stdout for done in diffc(["doctor"], ["formats"]))
    row, fix = (text for text in said.splitlines() if "plugin broken of diffc-example 1.2.0" in text)
    assert " no " in row
    assert "update or uninstall the package" in fix
    assert "diffc_example.not_there:FORMAT cannot be imported: ModuleNotFoundError" in said
    assert "plugin cancel-negation of diffc-example 1.2.0" in said
    assert "int8_linear" in formats


def test_two_packages_with_one_name_are_both_named(diffc: Diffc, tmp_path: Path, model: Path) -> None:
    other = shutil.copytree(ROOT / "tests" / "plugin_package", tmp_path / "other")
    text = (other / "pyproject.toml").read_text(encoding="utf-8")
    text = text.replace('name = "diffc-example"', 'name = "diffc-other"').replace(
        "diffc_example", "diffc_other"
    )
    (other / "pyproject.toml").write_text(text, encoding="utf-8")
    (other / "diffc_example").rename(other / "diffc_other")
    installed(tmp_path / "site", other)
    cases = (
        ("pass", "cancel-negation", "opt", model, "-p", "cancel-negation", "-o", tmp_path / "a"),
        ("format", "int8_linear", "compile", "tiny-sd3", "--format", "int8_linear", "-o", tmp_path / "a"),
        ("command", "count", "count", model, "--top", "3"),
        ("reader", "pointer file", "compile", tmp_path / "mine.pointer", "-o", tmp_path / "a"),
        ("model family", "auraflow", "inspect", backbone_of("AuraFlowTransformer2DModel", tmp_path)),
    )
    *refused, listed = diffc(*(command for _, _, *command in cases), ["formats"], paths=(tmp_path / "site",))
    assert listed.returncode == 0
    both = "diffc-example 1.2.0 and diffc-other 1.2.0"
    for (kind, name, *_), said in zip(cases, refused, strict=True):
        assert said.returncode == 1, said.stderr
        assert f"{both} both give this name" in said.stderr
        assert kind == "pass" or f"{kind} {name!r} is a plugin of {both}: " in said.stderr
    assert not (tmp_path / "a").exists()


def backbone_of(kind: str, folder: Path) -> Path:
    """A backbone folder of a class, with one weight."""
    backbone = folder / "backbone"
    backbone.mkdir()
    (backbone / "config.json").write_text(json.dumps({"_class_name": kind}), encoding="utf-8")
    save_file({"w": np.ones(2, np.float32)}, backbone / "diffusion_pytorch_model.safetensors")
    return backbone


def test_a_name_that_no_plugin_gives_is_unknown() -> None:
    assert plugins.unusable("diffc.formats", "format", "int9") is None
    assert plugins.unusable_ones("no.such.group", "format") == ""
    with pytest.raises(UsageError, match=r"unknown format 'int9'\. Known: none, int8"):
        find_format("int9")


def test_a_plugin_that_cannot_be_used_is_told_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "my.module:F cannot be imported: ImportError: no"
    for group, name in (("diffc.formats", "int9"), ("diffc.targets", "npu"), ("diffc.families", "dit")):
        monkeypatch.setitem(plugins._broken, (group, name), Broken(group, name, ("mine 1.0",), reason))
    for ask, said in (
        (lambda: find_format("int9"), "format 'int9'"),
        (lambda: find_target("npu"), "target 'npu'"),
        (lambda: find_family("dit"), "model family 'dit'"),
    ):
        with pytest.raises(DiffcError) as raised:
            ask()
        assert str(raised.value).startswith(
            f"{said} is a plugin of mine 1.0: {reason}\n  Fix: update or uninstall"
        )
        assert raised.value.exit_code == 1
    with pytest.raises(UnsupportedError, match=r"Known: .*\n  model family 'dit' is a plugin of mine 1.0"):
        family_of({"_class_name": "DitModel"}, "here")
