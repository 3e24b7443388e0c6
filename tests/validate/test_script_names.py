"""What `diffc validate --script` writes is data and constant code, whatever an artifact's files are called."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffc.artifact.folder import write_manifest
from diffc.cli.main import run
from diffc.commands.validate import ValidateRequest, validate_artifact
from diffc.validate import polygraphy_case
from tests.artifact.manifests import described

NAMES = (
    'x" + str(getattr(__import__("os"), "system")("touch PWNED")) + ".onnx',
    "x'; touch PWNED; '.onnx",
    "$(touch PWNED).onnx",
    '"""\nimport os\nos.system("touch PWNED")\n""".onnx',
    "{name} {types!r}.onnx",
    "-rf.onnx",
)


def artifact(folder: Path, name: str) -> Path:
    """A graph in an artifact, in a file called `name`; its input is called so, too."""
    folder.mkdir()
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), "W")
    value = helper.make_tensor_value_info
    x, y = value(name, TensorProto.FLOAT, ["n", 64]), value("y", TensorProto.FLOAT, ["n", 64])
    graph = helper.make_graph([helper.make_node("MatMul", [name, "W"], ["y"], "m")], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    file = name.replace("\n", "")  # no manifest may name a file with a line end
    (folder / file).write_bytes(model.SerializeToString())
    content = described(format="as imported", targets={"ort": file}, model={"name": name})
    write_manifest(folder, content, {})
    return folder


@pytest.mark.skipif(os.name == "nt", reason="has no such names")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_never_code(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "script"
    validate_artifact(ValidateRequest(artifact(tmp_path / "a", name), against="ort"), script=folder)
    codes = {p.read_text() for p in folder.glob("*.py")}
    assert codes == {polygraphy_case.LOADER, polygraphy_case.COMPARE}
    for file in folder.iterdir():
        assert file.name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        if file.suffix == ".py":
            subprocess.run([sys.executable, str(file)], cwd=folder, check=True)
    lines = (folder / "run.sh").read_text().splitlines()[3:]
    for line in lines:
        assert line.startswith("polygraphy run ")
        assert all(character.isalnum() or character in " -._" for character in line)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "polygraphy").write_text("#!/bin/sh\nexit 0\n")
    (bin_folder / "polygraphy").chmod(0o755)
    path = os.pathsep.join([str(bin_folder), os.environ["PATH"]])
    subprocess.run(["sh", str(folder / "run.sh")], cwd=folder, env={**os.environ, "PATH": path}, check=True)
    assert not list(tmp_path.rglob("PWNED"))


def test_a_case_says_types_and_limit_as_data(tmp_path: Path) -> None:
    folder = tmp_path / "script"
    validate_artifact(
        ValidateRequest(artifact(tmp_path / "a", 'a"b'), against="ort", limit=0.25), script=folder
    )
    (case, *_) = folder.glob("*-case.json")
    held = json.loads(case.read_text())
    assert (held["types"], held["limit"]) == ({'a"b': "float32"}, 0.25)
    assert (folder / held["inputs"]).is_file()
    for code in (polygraphy_case.LOADER, polygraphy_case.COMPARE):
        ast.parse(code)


def test_a_command_that_is_shown_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "m.onnx; rm -rf ~"
    folder = artifact(tmp_path / "a", name)
    assert run(["validate", str(folder), "--against", "torch"]) == 1
    assert f"--against {shlex.quote(name)}" in capsys.readouterr().err
